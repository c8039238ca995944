"""The config as Python sees it: defaults, rules, round trips, the reference file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config as module
from config import (
    SECTIONS,
    Config,
    ConfigError,
    DatasetConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainingConfig,
    accumulation_steps,
    holds_out,
    schema,
    sequences_per_step,
    token_paths,
    warmup_steps,
)
from settings.schema import Effect, OnResume, Option, Section, section_options
from settings.values import check_value, to_text

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = list(schema().options.values())
OWNED = {option.name: option.models for option in OPTIONS if option.models}


def test_the_reference_file_is_the_defaults_word_for_word() -> None:
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    assert text == module.reference(), "python config.py > config.yaml"
    assert max(map(len, text.splitlines())) <= 100
    assert Config.from_yaml(ROOT / "config.yaml") == Config()


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_option_has_a_meaning_and_a_default_in_range(option: Option) -> None:
    assert option.doc and option.doc.isascii()
    assert check_value(option, option.default) == option.default


def test_every_section_says_what_a_resume_allows_and_what_its_options_do_to_results() -> None:
    for option in OPTIONS:
        assert option.on_resume in get_args(OnResume) and option.effect in get_args(Effect)
    known = schema().options["model.name"].choices
    assert all(set(option.models) <= set(known) for option in OPTIONS)
    with pytest.raises(TypeError, match="on_resume"):
        type("Forgotten", (Section,), {}, section="forgotten", effect="results")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 3  # type: ignore[misc]


MODELS = ("bdh", "gpt", "llama")
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
PRETRAINED: dict[str, dict[str, Any]] = {
    "model": {"name": "gpt", "vocab_size": None},
    "training": {"init_from": "gpt2"},
}
UNTIED = PRETRAINED | {"model": PRETRAINED["model"] | {"tie_embeddings": False}}
RULES: list[tuple[dict[str, dict[str, Any]], str]] = [
    (
        {"training": {"batch_size": "auto"}},
        "training.batch_size=auto needs the size of a step, and training.tokens_per_step=null; set "
        "training.tokens_per_step.",
    ),
    (
        {"logging": {"tensorboard": True}, "training": {"save_model": False}},
        "logging.tensorboard=true writes into the run directory, which there is none of with "
        "training.save_model=false.",
    ),
    (
        {"training": {"sample_tokens": 50}},
        "training.sample_tokens=50 is the length of a sample, which there is none of with "
        "training.sample_prompt=null.",
    ),
    (
        {"training": {"sample_prompt": "the", "test_freq": None}},
        "training.sample_prompt=the is for evaluations, which there are none of with "
        "training.test_freq=null.",
    ),
    (
        {"model": {"n_embd": 250}},
        "model.n_embd=250 is not divisible by model.n_head=4; nearest: 248, 252.",
    ),
    ({"model": {"n_embd": 3}}, "model.n_embd=3 is not divisible by model.n_head=4; nearest: 4."),
    (
        {"model": {"n_embd": 252, "mlp_internal_dim_multiplier": 3}},
        "model.mlp_internal_dim_multiplier=3 * model.n_embd=252 / model.n_head=4 is an odd number "
        "of neurons per head, and they rotate in pairs; n_embd nearest: 248, 256.",
    ),
    (
        {"model": {"vocab_size": 200}},
        "model.vocab_size=200 is too small for tokenizer.name=bytes; it has 256 tokens; null takes "
        "their number.",
    ),
    (
        {"schedule": {"min_lr": 0.1}},
        "schedule.min_lr=0.1 is above training.learning_rate=1e-3; null means a tenth of it.",
    ),
    (
        {"schedule": {"warmup_iters": 3001}},
        "schedule.warmup_iters=3001 is above training.max_iters=3000; null means 3 % of it.",
    ),
    (
        {"schedule": {"warmup_iters": 100, "lr_decay_iters": 99}},
        "schedule.lr_decay_iters=99 is below schedule.warmup_iters=100 with "
        "training.max_iters=3000; warm-up takes 100 steps.",
    ),
    (
        {"schedule": {"lr_decay_iters": 89}},
        "schedule.lr_decay_iters=89 is below schedule.warmup_iters=null with "
        "training.max_iters=3000; warm-up takes 90 steps.",
    ),
    (
        {"training": {"tokens_per_step": 4096, "gradient_accumulation_steps": 2}},
        "training.tokens_per_step=4096 and training.gradient_accumulation_steps=2 exclude each "
        "other; set one.",
    ),
    (
        {"training": {"tokens_per_step": 5000}},
        "training.tokens_per_step=5000 is not a multiple of training.block_size=512 * "
        "training.batch_size=8; nearest: 4096, 8192.",
    ),
    (
        {"dataset": {"test_fraction": 0}},
        "training.test_freq=500 evaluates on held-out text and dataset.test_fraction=0.0 holds "
        "none out; set training.test_freq to null.",
    ),
    (
        {"dataset": {"test_fraction": 0}, "training": {"test_freq": None, "eval_only": True}},
        "training.eval_only=true evaluates on held-out text and dataset.test_fraction=0.0 holds "
        "none out.",
    ),
    (
        {"model": {"name": "llama", "n_kv_head": 3}},
        "model.n_head=4 is not divisible by model.n_kv_head=3.",
    ),
    (
        {"model": {"name": "llama", "n_embd": 252, "n_head": 4}},
        "model.n_embd=252 / model.n_head=4 is an odd width of a head, and model.name=llama "
        "rotates in pairs; n_embd nearest: 248, 256.",
    ),
    (
        {"model": {"name": "gpt", "attention": "flash", "mask": "causal_document"}},
        "model.attention=flash sees no documents, which model.mask=causal_document asks for; set "
        "model.attention to auto.",
    ),
    (
        {"training": {"init_from": "gpt2"}, "model": {"name": "llama", "vocab_size": None}},
        "training.init_from=gpt2 is a GPT-2, and model.name=llama; set model.name to gpt.",
    ),
    (
        {"training": {"init_from": "resume", "resume_from_checkpoint": "auto"}},
        "training.init_from=resume and training.resume_from_checkpoint=auto exclude each other; "
        "set one.",
    ),
    (
        {"dataset": {"name": "owt", "train_data_path": "a.bin"}},
        "dataset.name=owt and dataset.train_data_path=a.bin name two texts; set one.",
    ),
    (
        {"dataset": {"val_data_path": "a.bin"}},
        "dataset.val_data_path=a.bin needs dataset.train_data_path=null.",
    ),
    (
        {"model": {"vocab_size": 50256}, "tokenizer": {"name": "gpt2"}},
        "model.vocab_size=50256 is too small for tokenizer.name=gpt2; it has 50257 tokens; null "
        "takes their number.",
    ),
    (
        {"low_precision": {"use_fp8": True, "compute_dtype": "float16"}},
        "low_precision.use_fp8=true leaves all but its products in bfloat16, and "
        "low_precision.compute_dtype=float16.",
    ),
    (
        {"low_precision": {"use_fp8": True}, "training": {"batch_size": 3, "block_size": 100}},
        "low_precision.use_fp8=true takes multiples of 16 tokens, which training.batch_size=3 * "
        "training.block_size=100 is not; batch_size nearest: 16.",
    ),
    (
        {"fp8": {"recipe": "mxfp8", "backend": "native"}},
        "fp8.recipe=mxfp8 is one of Transformer Engine's, and fp8.backend=native.",
    ),
    *(
        (
            {"fp8": {name: value, "recipe": "current"}},
            f"fp8.{name}={value} is for delayed scaling, and fp8.recipe=current; set fp8.recipe to "
            "delayed.",
        )
        for name, value in (("amax_history_len", 16), ("amax_compute_algo", "most_recent"))
    ),
    (
        {
            "system": {"compile": True},
            "fp8": {"recipe": "delayed"},
            "low_precision": {"use_fp8": True},
            "model": {"name": "gpt"},
        },
        "system.compile=true with fp8.recipe=delayed works for model.name=bdh only, and "
        "model.name=gpt; set system.compile to auto.",
    ),
    (
        {"low_precision": {"use_4bit_optimizer": True}, "optimizer": {"name": "muon"}},
        "low_precision.use_4bit_optimizer=true is AdamW with 4-bit moments, and "
        "optimizer.name=muon; set one of them.",
    ),
    (
        {"low_precision": {"quantize_head": True}, "model": {"name": "gpt"}},
        "low_precision.quantize_embedding=false and low_precision.quantize_head=true differ, but "
        "with model.tie_embeddings=true they are one matrix.",
    ),
    (
        {"low_precision": {"lora_rank": 4, "quantize_after": 0.5}, **PRETRAINED},
        "low_precision.quantize_after=0.5 is for training all weights, and "
        "low_precision.lora_rank=4.",
    ),
    (
        {"low_precision": {"lora_rank": 4, "use_4bit": False}, **PRETRAINED},
        "low_precision.lora_rank=4 adds adapters to 4-bit weights, and "
        "low_precision.use_4bit=false.",
    ),
    (
        {"low_precision": {"lora_rank": 4}, "model": {"name": "gpt"}},
        "low_precision.lora_rank=4 freezes the weights it begins with, and "
        "training.init_from=scratch draws them at random.",
    ),
    (
        {"low_precision": {"lora_rank": 4, "use_fp8": True}, **PRETRAINED},
        "low_precision.lora_rank=4 computes with 4-bit weights in bfloat16, and "
        "low_precision.use_fp8=true.",
    ),
    (
        {"low_precision": {"lora_rank": 4}, "optimizer": {"name": "muon"}, **PRETRAINED},
        "low_precision.lora_rank=4 trains adapters, and optimizer.name=muon is for whole matrices.",
    ),
    *(
        (
            {"low_precision": {"lora_rank": 4, name: True}, **UNTIED},
            "low_precision.lora_rank=4 freezes hidden matrices in 4 bits, and "
            f"low_precision.{name}=true is for training all weights.",
        )
        for name in ("quantize_embedding", "quantize_head")
    ),
    *(
        (
            {
                "model": {
                    "name": next(m for m in MODELS if m not in models),
                    option: CHANGED[option],
                }
            },
            f"model.{option}={to_text(CHANGED[option])} is an option of {' and '.join(models)}, "
            f"and model.name={next(m for m in MODELS if m not in models)}.",
        )
        for option, models in OWNED.items()
    ),
]


@pytest.mark.parametrize(("values", "message"), RULES)
def test_a_broken_rule_names_its_keys_and_values(
    values: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError) as direct:
        Config(**{name: SECTIONS[name](**options) for name, options in values.items()})
    assert str(direct.value) == message
    with pytest.raises(ConfigError) as from_dict:
        Config.from_dict(values, source="checkpoint_5.json")
    assert str(from_dict.value).startswith(f"checkpoint_5.json: {message.rstrip('.')}")


def test_every_rule_is_tested() -> None:
    for rule in module.rules():
        assert any(all(key in message for key in rule.keys) for _, message in RULES)


@pytest.mark.parametrize(("option", "models"), OWNED.items())
def test_an_option_of_a_model_is_taken_by_that_model_and_at_its_default_by_all(
    option: str, models: tuple[str, ...]
) -> None:
    default = getattr(Config().model, option)
    for name in MODELS:
        assert (
            getattr(Config.from_dict({"model": {"name": name, option: default}}).model, option)
            == default
        )
    for name in models:
        values = {"name": name, option: CHANGED[option]}
        assert getattr(Config.from_dict({"model": values}).model, option) == CHANGED[option]


TEXTS: list[tuple[dict[str, Any], tuple[str, str | None] | None, bool]] = [
    ({}, None, True),
    ({"test_fraction": 0.0}, None, False),
    ({"name": "owt", "test_fraction": 0.0}, ("data/owt/train.bin", "data/owt/val.bin"), True),
    ({"train_data_path": "a.ids", "test_fraction": 0.0}, ("a.ids", None), False),
    ({"train_data_path": "a.ids"}, ("a.ids", None), True),
    ({"train_data_path": "a", "val_data_path": "b", "test_fraction": 0.0}, ("a", "b"), True),
]


@pytest.mark.parametrize(("values", "paths", "held_out"), TEXTS)
def test_the_text_is_token_files_where_they_are_named_and_parquet_otherwise(
    values: dict[str, Any], paths: tuple[str, str | None] | None, held_out: bool
) -> None:
    dataset = DatasetConfig(**values)
    assert token_paths(dataset) == paths
    assert holds_out(dataset) is held_out


LEFT_OUT: list[tuple[dict[str, dict[str, Any]], dict[str, Any]]] = [
    ({}, {"tokenizer.name": "bytes", "model.vocab_size": 256}),
    ({"dataset": {"name": "x"}}, {"tokenizer.name": "auto", "model.vocab_size": None}),
    ({"dataset": {"train_data_path": "x"}}, {"tokenizer.name": "auto", "model.vocab_size": None}),
    ({"tokenizer": {"name": "gpt2"}}, {"model.vocab_size": None}),
    ({"tokenizer": {"name": "gpt2"}, "model": {"vocab_size": 50304}}, {"model.vocab_size": 50304}),
    (
        {"training": {"init_from": "gpt2-xl"}},
        {"model.name": "gpt", "tokenizer.name": "gpt2", "model.vocab_size": None},
    ),
    (
        {"training": {"init_from": "gpt2"}, "dataset": {"name": "x"}},
        {"model.name": "gpt", "tokenizer.name": "auto", "model.vocab_size": None},
    ),
    (
        {"training": {"init_from": "weights.pt"}, "model": {"name": "gpt"}},
        {"model.vocab_size": None, "tokenizer.name": "bytes"},
    ),
    ({"tokenizer": {"vocab_multiple": 100}}, {"model.vocab_size": 300}),
    ({"model": {"name": "gpt"}}, {"low_precision.use_4bit": False}),
    (
        {"low_precision": {"lora_rank": 4}, "training": {"init_from": "gpt2"}},
        {"low_precision.use_4bit": True},
    ),
    ({"low_precision": {"use_4bit": False}}, {"low_precision.use_4bit": False}),
    ({}, {"low_precision.use_4bit": True, "fp8.recipe": "current", "fp8.format": "hybrid"}),
    ({"fp8": {"amax_history_len": 16}}, {"fp8.recipe": "delayed", "fp8.format": "hybrid"}),
    ({"fp8": {"recipe": "mxfp8"}}, {"fp8.format": "e4m3"}),
    ({"fp8": {"recipe": "mxfp8", "format": "hybrid"}}, {"fp8.format": "hybrid"}),
]


@pytest.mark.parametrize(("values", "expected"), LEFT_OUT)
def test_what_is_left_out_follows_from_what_is_said_in_python_as_in_a_file(
    values: dict[str, dict[str, Any]], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = Config(**{name: SECTIONS[name](**options) for name, options in values.items()})
    found = config.to_dict()
    for key, value in expected.items():
        section, name = key.split(".")
        assert found[section][name] == value, key
    assert Config.from_dict(values) == config
    (tmp_path / "my.yaml").write_text(json.dumps(values))
    assert Config.from_yaml(tmp_path / "my.yaml") == config
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "resolved.yaml") == config


def test_a_broken_rule_says_where_each_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("model:\n  n_embd: 250\n")
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml("my.yaml")
    assert str(caught.value) == (
        "my.yaml:2: model.n_embd=250 is not divisible by model.n_head=4; nearest: 248, 252 "
        "[model.n_head: default]"
    )
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml("my.yaml", ["n_head=3"])
    assert str(caught.value).startswith("command line: model.n_embd=250 is not divisible by")
    assert str(caught.value).endswith("[model.n_embd: my.yaml:2]")
    assert Config.from_yaml("my.yaml", ["n_head=2"]).model.n_embd == 250


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            TrainingConfig,
            {"batch_size": "8"},
            "training.batch_size: expected a whole number or auto, got 8",
        ),
        (TrainingConfig, {"batch_size": True}, "expected a whole number or auto, got true"),
        (TrainingConfig, {"batch_size": 8.0}, "expected a whole number or auto, got 8.0"),
        (TrainingConfig, {"learning_rate": math.nan}, "must be finite, got nan"),
        (TrainingConfig, {"learning_rate": 10**400}, "expected a number, got 1000"),
        (TrainingConfig, {"seed": 2**63}, "must be at most 2**63 - 1, got 9223372036854775808"),
        (DatasetConfig, {"parquet_dir": Path("x")}, "dataset.parquet_dir: expected text, got a Po"),
        (DatasetConfig, {"parquet_dir": None}, "expected text, got null"),
        (OptimizerConfig, {"beta1": 1}, "optimizer.beta1: must be in [0, 1), got 1.0"),
        (ScheduleConfig, {"name": "Cosine"}, "got 'Cosine'. Did you mean cosine?"),
        (ModelConfig, {"name": None}, "expected one of bdh, gpt, llama, got null"),
        (ModelConfig, {"n_layer": 0, "n_head": 0}, "model.n_head: must be >= 1, got 0"),
    ],
)
def test_values_given_in_python_are_checked_like_those_of_a_file(
    section: type, value: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**value)
    assert message in str(caught.value)


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    training = TrainingConfig(learning_rate=1, save_every=60)
    assert repr((training.learning_rate, training.save_every)) == "(1.0, 60.0)"


def test_unknown_names_in_a_checkpoint_are_refused() -> None:
    with pytest.raises(ConfigError, match="x.json: training.sede: unknown option. Did you mean se"):
        Config.from_dict({"training": {"sede": 3}}, source="x.json")
    with pytest.raises(ConfigError, match="expected a section"):
        Config.from_dict({"training": 3})
    with pytest.raises(ConfigError, match="distributed.strategy: not available in this version"):
        Config.from_dict({"distributed": {"strategy": "fsdp"}})


@pytest.mark.parametrize(("world_size", "steps"), [(1, 12), (2, 6), (3, 4), (4, 3)])
def test_tokens_per_step_fix_the_accumulation(world_size: int, steps: int) -> None:
    config = Config(training=TrainingConfig(tokens_per_step=12 * 8 * 512))
    assert accumulation_steps(config, world_size) == steps
    assert sequences_per_step(config, world_size) == 96


def test_tokens_per_step_that_no_accumulation_reaches_are_refused() -> None:
    config = Config(training=TrainingConfig(tokens_per_step=9 * 512, batch_size=1))
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(config, 4)
    assert str(caught.value) == (
        "training.tokens_per_step=4608 is not a multiple of training.block_size=512 * "
        "training.batch_size=1 * 4 processes; nearest: 4096, 6144."
    )


def test_accumulation_without_tokens_per_step_counts_per_process() -> None:
    config = Config(training=TrainingConfig(gradient_accumulation_steps=5))
    assert accumulation_steps(config, 4) == 5
    assert sequences_per_step(config, 4) == 5 * 8 * 4


def test_warm_up_is_3_percent_of_the_steps_that_are_planned() -> None:
    config = Config()
    assert (warmup_steps(config), warmup_steps(config, 1000), warmup_steps(config, 0)) == (
        90,
        30,
        0,
    )
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
    """Draw configs whose values are extreme on their own and agree with each other."""
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for option in OPTIONS:
        values[option.section][option.name] = draw(value_of(option))
    model, training, dataset = values["model"], values["training"], values["dataset"]
    heads = model["n_head"] % 2**31 + 1
    model.update(n_embd=heads * 2, n_head=heads, n_kv_head=None)
    if model["mask"] == "causal_document" and model["attention"] == "flash":
        model["attention"] = "flex"
    for option in section_options(ModelConfig):
        if model["name"] not in OWNED.get(option.name, (model["name"],)):
            model[option.name] = option.default
    model["vocab_size"] = model["vocab_size"] and max(50257, model["vocab_size"])
    training.update(tokens_per_step=None, test_freq=None, eval_only=False, init_from="scratch")
    training.update(sample_prompt=None, sample_tokens=100, save_model=True)
    if training["batch_size"] == "auto":
        training.update(tokens_per_step=training["block_size"], gradient_accumulation_steps=1)
    dataset.update(draw(st.sampled_from([{"name": None}, {"train_data_path": None}])))
    dataset.update({} if dataset["train_data_path"] else {"val_data_path": None})
    values["schedule"].update(warmup_iters=0, lr_decay_iters=None, min_lr=0.0)
    low, fp8 = values["low_precision"], values["fp8"]
    low.update(use_fp8=False, use_4bit_optimizer=False, lora_rank=None)
    low.update(quantize_embedding=low["quantize_head"])
    fp8.update(backend="auto", recipe="delayed")
    return Config.from_dict(values)


@given(configs())
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_back_equal(tmp_path_factory: Any, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    config.save(path)
    assert Config.from_yaml(path) == config
    path.write_text(config.to_yaml(["a header\nin two lines", "", "model: {seed: 1}"]), "utf-8")
    assert Config.from_yaml(path) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
