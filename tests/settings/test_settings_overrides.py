"""The command line: every spelling, aliases, names still to come, and each mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from config import Config, ConfigError, Request, command_line
from settings import names
from settings.foreign import fivezeroes_bdh
from settings.values import to_text

ROOT = Path(__file__).resolve().parents[2]
Ask = Callable[..., Request]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return command_line in a folder that holds an empty config.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    return lambda *argv: command_line(argv)


def complaint(ask: Ask, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        ask(*argv)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.strip()


SPELLINGS = [
    ["learning_rate=3e-4"],
    ["training.learning_rate=3e-4"],
    ["--learning_rate=3e-4"],
    ["--learning-rate=3e-4"],
    ["--learning_rate", "3e-4"],
    ["--training.learning_rate=3e-4"],
    ["--training.learning-rate", "3e-4"],
    ["lr=3e-4"],
    ["--lr", "3e-4"],
    ["optimizer.lr=3e-4"],
    ["lr=3e-4", "--lr", "0.0003"],
]


@pytest.mark.parametrize("argv", SPELLINGS, ids=" ".join)
def test_every_spelling_of_an_override_means_the_same(ask: Ask, argv: list[str]) -> None:
    request = ask(*argv)
    assert request.config.training.learning_rate == 3e-4
    assert Config.from_yaml("config.yaml", argv) == request.config
    assert Config.from_yaml("config.yaml", request.overrides) == request.config


@pytest.mark.parametrize(
    "argv",
    [["--debug"], ["--debug", "--seed=3"], ["--debug", "seed=3"], ["--debug", "config.yaml"]]
    + [["--debug", "on"], ["debug=True"], ["--training.debug"]],
    ids=" ".join,
)
def test_a_flag_alone_is_true(ask: Ask, argv: list[str]) -> None:
    assert ask(*argv).config.training.debug is True


def test_negative_numbers_are_values_of_the_flag_before_them(
    ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be >= 0, got -1" in complaint(ask, capsys, "--weight_decay", "-1")


@pytest.mark.parametrize("word", ["null", "none", "None", "~"])
def test_null_clears_an_optional_value(ask: Ask, word: str) -> None:
    assert ask(f"test_freq={word}").config.training.test_freq is None


def test_quotes_inside_the_shell_make_text(ask: Ask) -> None:
    assert ask("text_column='no'").config.dataset.text_column == "no"


@pytest.mark.parametrize(
    "text", ["betas=[0.8,0.99]", "betas=[0.8, 0.99]", "optimizer.betas=.8,.99"]
)
def test_betas_are_a_list(ask: Ask, text: str) -> None:
    optimizer = ask(text).config.optimizer
    assert (optimizer.beta1, optimizer.beta2) == (0.8, 0.99)


def test_files_are_applied_in_order_wherever_they_stand(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\nmax_iters: 10")
    (tmp_path / "lr=2.yml").write_text("seed: 2")
    request = ask("--config=one.yaml", "log_freq=7", "./lr=2.yml", "--dry-run")
    training = request.config.training
    assert (training.seed, training.max_iters, training.log_freq) == (2, 10, 7)
    assert request.files == ("one.yaml", "./lr=2.yml")
    assert request.overrides == ("log_freq=7",)
    assert request.dry_run and not ask().dry_run
    assert ask().files == ("config.yaml",)


WORDS = [  # what is typed, what it means, what is said of the value
    (["device=gpu"], ["system.device=cuda"], "system.device=gpu is read as system.device=cuda"),
    (
        ["--device", "GPU"],
        ["system.device=cuda"],
        "system.device=GPU is read as system.device=cuda",
    ),
    (
        ["dtype=fp32"],
        ["compute_dtype=float32"],
        "fp32 is read as low_precision.compute_dtype=float",
    ),
    (["dtype=bf16"], [], "bf16 is read as low_precision.compute_dtype=bfloat16"),
    (["optimizer=adam"], [], "optimizer.name=adam is read as optimizer.name=adamw"),
    (["steps=10"], ["max_iters=10"], "steps is read as training.max_iters"),
    (
        ["--resume"],
        ["resume_from_checkpoint=auto"],
        "=true is read as training.resume_from_checkpo",
    ),
    (
        ["--resume", "a/b.pt"],
        ["resume_from_checkpoint=a/b.pt"],
        "resume is read as training.resume",
    ),
    (["--resume", "my.yaml"], ["my.yaml", "resume_from_checkpoint=auto"], "=true is read as"),
]


@pytest.mark.parametrize(("typed", "meant", "note"), WORDS, ids=str)
def test_words_that_people_type_are_taken_and_what_they_mean_is_said(
    ask: Ask, typed: list[str], meant: list[str], note: str
) -> None:
    Path("my.yaml").write_text("seed: 3")
    request = ask(*typed)
    assert request.config == ask(*meant).config
    assert any(note in line for line in request.notes)


def test_the_endings_and_spellings_of_files_and_dry_runs(ask: Ask) -> None:
    for word in ("--dryrun", "--dry_run", "dry_run=true", "--dry-run=yes"):
        assert ask(word).dry_run
    assert not ask("dry_run=false").dry_run
    Path("config.yaml").unlink()
    Path("config.yml").write_text("seed: 3")
    Path("OTHER.YML").write_text("seed: 4")
    assert ask().files == ("config.yml",) and ask("OTHER.YML").config.training.seed == 4


TWICE = [
    (["batch_size=8", "--batch-size", "16"], "training.batch_size: given twice: 8 and 16. The las"),
    (["lr=1e-4", "lr=1e-4", "lr=2e-4"], "training.learning_rate: given twice: 1e-4 and 2e-4. The"),
    (
        ["lr=1e-4", "learning_rate=2e-4"],
        "training.learning_rate: given twice as lr and as learning_rate: 1e-4 and 2e-4. The last",
    ),
]


@pytest.mark.parametrize(("argv", "note"), TWICE, ids=str)
def test_of_a_flag_given_twice_the_last_is_taken_and_said(
    ask: Ask, argv: list[str], note: str
) -> None:
    request = ask(*argv)
    assert sum(line.startswith(note) for line in request.notes) == 1
    assert request.config == ask(argv[-1] if "=" in argv[-1] else f"batch_size={argv[-1]}").config
    assert Config.from_yaml("config.yaml", request.overrides) == request.config


MISTAKES = [
    (["--lrr", "3"], "--lrr: unknown option. Did you mean training.learning_rate?"),
    (["--learing-rate=3"], "learing_rate: unknown option. Did you mean training.learning_rate?"),
    (["training.learing_rate=3"], "training.learing_rate: unknown option. Did you mean learning_"),
    (["trainin.seed=3"], "trainin: unknown section. Did you mean training?"),
    (["model.seed=3"], "model.seed: unknown option. It belongs in section training."),
    (["--xyzzy"], "--xyzzy: unknown option. See python train.py --help."),
    (["-lr", "lr=3"], "'-lr': unknown option. Did you mean training.learning_rate?"),
    (["batch_size="], "batch_size=: empty value. Write batch_size=null to clear"),
    (["--batch_size"], "--batch_size: a value is missing. Write --batch_size=VALUE."),
    (["--batch_size", "--debug"], "--batch_size: a value is missing."),
    (["--gpu"], "--gpu: unknown option. Write device=cuda."),
    (["gpu=0"], "gpu: unknown option. Write device=cuda."),
    (["cuda:0"], "'cuda:0': not key=value. Write device=cuda."),
    (["--num_gpus=8"], "num_gpus: unknown option. Start it with torchrun --nproc_per_node=N."),
    (["--bf16"], "--bf16: unknown option. Write dtype=bfloat16."),
    (["data=x"], "data: unknown option. Write parquet_dir=FOLDER for text, train_data_path=FILE"),
    (["name=bdh"], "name: names several options. Write one of model.name, optimizer.name, sch"),
    (["training=8"], "training: is a section. Write training.OPTION=value."),
    (["junk"], "'junk': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    (["a b"], "'a b': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    ([""], "'': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    (["\udcff=1"], "'\\uDCFF=1': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    (["--config="], "--config: the name of a file is missing."),
    (["--dry-run=1"], "--dry-run takes no value."),
    (["--dry-run", "--check-resume"], "--dry-run and --check-resume exclude each other."),
    (
        ["checkpoint_dir=no"],
        "training.checkpoint_dir: expected text, got the word no. Quote it: '\"no",
    ),
    (["betas=0.9"], "betas: expected a list of 2 numbers (optimizer.beta1, optimizer.beta2), got "),
    (
        ["max_iters=ten"],
        "training.max_iters: expected a whole number, got 'ten'. The default is 3000.",
    ),
    (["lr=fast"], "training.learning_rate (given as lr): expected a number, got 'fast'."),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda value: str(value)[:30])
def test_each_mistake_on_the_command_line_has_its_message(
    ask: Ask, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    found = complaint(ask, capsys, *argv)
    assert found.startswith(f"command line: {message}")
    assert len(found.splitlines()) == 1


def test_without_config_yaml_the_message_says_how_to_name_a_file(
    ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").unlink()
    assert complaint(ask, capsys) == "config.yaml: not found. Pass --config FILE."
    assert "file is missing" in complaint(ask, capsys, "--config")


def test_from_yaml_takes_overrides_only(ask: Ask) -> None:
    for word in ("other.yaml", "--dry-run", "--help"):
        with pytest.raises(ConfigError, match=f"command line: {word}: not an override"):
            Config.from_yaml("config.yaml", [word])


def test_help_lists_every_option_within_100_columns(
    ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        ask("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    for section, options in Config().to_dict().items():
        assert f"\n{section}: " in text
        assert all(f"\n  {name} " in text for name in options)


# They say more than the option: test_presets.py, test_names.py.
SAY_MORE = ("dataset", "wandb_log.name", *fivezeroes_bdh.MARKS)
ALIASES = [
    (alias, key)
    for key, others in names.ALIASES.items()
    for alias in others
    if alias not in SAY_MORE
]


def other_value(key: str) -> str:
    return {
        "model.name": "gpt",
        "optimizer.name": "muon",
        "schedule.name": "linear",
        "tokenizer.name": "gpt2",
        "model.n_head": "8",
        "model.dropout": "0.25",
        "dataloader.shuffle": "false",
        "low_precision.compute_dtype": "float32",
        "training.resume_from_checkpoint": "a/b.pt",
        "training.checkpoint_dir": "out",
        "logging.wandb_log": "true",
        "dataset.parquet_dir": "elsewhere",
        "dataset.test_fraction": "0.25",
        "distributed.backend": "gloo",
    }.get(key, "64" if key.startswith("training.") else "512")


@pytest.mark.parametrize(("alias", "key"), ALIASES)
def test_an_alias_sets_the_option_it_stands_for_and_says_so(ask: Ask, alias: str, key: str) -> None:
    value = other_value(key)
    from_line = ask(f"{alias}={value}")
    says_so = () if key.endswith(f".{alias}") else (f"{alias} is read as {key}",)
    assert from_line.notes == says_so
    assert from_line.config == ask(f"{key}={value}").config != Config()
    section, _, name = alias.rpartition(".")
    Path("config.yaml").write_text(
        f"{section}:\n  {name}: {value}" if section else f"{name}: {value}"
    )
    assert ask().config == from_line.config
    assert ask().notes == from_line.notes


def test_an_alias_may_stand_in_the_section_of_its_option(ask: Ask) -> None:
    Path("config.yaml").write_text("model: {d_model: 128, num_heads: 2}\ntraining: {lr: 0.5}")
    config = ask().config
    assert (config.model.n_embd, config.model.n_head) == (128, 2)
    assert config.training.learning_rate == 0.5


def test_every_alias_stands_for_an_option_that_exists_or_is_announced() -> None:
    options = {f"{s}.{name}" for s, names in Config().to_dict().items() for name in names}
    announced = set(names.UNSUPPORTED) | set(names.EXTRA_OPTIONS)
    assert not options & announced
    assert len(announced) == len([*names.UNSUPPORTED, *names.EXTRA_OPTIONS])
    assert set(names.ALIASES) <= options | announced
    assert not set(names.TARGETS) & (options | announced)
    assert {"mlp_internal_dim_multiplier", "mlp_scale_factor", "d_ff"}.isdisjoint(names.TARGETS)


@pytest.mark.parametrize("key", names.UNSUPPORTED)
def test_an_option_still_to_come_is_refused_unless_it_asks_for_nothing(
    ask: Ask, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    section, name = key.split(".")
    Path("config.yaml").write_text(f"{section}:\n  {name}: something\n")
    harmless = names.UNSUPPORTED[key]
    remedy = "Remove it" if harmless in ((), ("null",)) else f"Set it to {harmless[0]}"
    message = f"config.yaml:2: {key}: not available in this version. {remedy}."
    assert complaint(ask, capsys) == message
    for value in harmless:
        Path("config.yaml").write_text(f"{section}:\n  {name}: {value}\n")
        request = ask()
        assert request.notes == (f"{key}={value} changes nothing in this version",)
        assert request.config == Config()


LOW_PRECISION = """
low_precision:
  use_fp8: false
  use_4bit: true
  use_4bit_optimizer: false
  quantization_type: "nf4"
  use_double_quant: true
  compute_dtype: "bfloat16"
fp8: {format: hybrid, amax_history_len: 1024, amax_compute_algo: max}
"""


def test_low_precision_as_documented_is_the_default(ask: Ask) -> None:
    Path("my.yaml").write_text(LOW_PRECISION)
    request = ask("my.yaml")
    assert request.config == Config() and not request.notes


WISHES = [  # the text of a file, the command line, what the user asked for
    ("", [], set()),
    (LOW_PRECISION, [], set()),
    ("low_precision: {use_4bit: auto}", ["model.name=gpt"], {"model.name"}),
    (LOW_PRECISION, ["model.name=gpt"], {"model.name", "low_precision.use_4bit"}),
    ("", ["use_4bit=true", "model.name=llama"], {"model.name", "low_precision.use_4bit"}),
    ("", ["use_4bit=false", "model.name=llama"], {"model.name"}),
    ("", ["use_4bit=false"], {"low_precision.use_4bit"}),
    ("", ["tokenizer.name=bytes", "vocab_size=256"], set()),
    ("", ["fp8.recipe=delayed", "amax_history_len=8"], {"fp8.amax_history_len"}),
    ("dataset: x", ["n_layer=12"], {"dataset.name"}),  # as its base has it
    ("dataset: x", ["n_layer=6"], {"dataset.name", "model.n_layer"}),
]


@pytest.mark.parametrize(("text", "argv", "given"), WISHES)
def test_a_value_that_would_be_the_same_if_left_out_is_no_wish(
    ask: Ask, text: str, argv: list[str], given: set[str]
) -> None:
    Path("my.yaml").write_text(text)
    assert ask("my.yaml", *argv).given == given


EDITS: list[dict[str, object]] = [
    {},
    {"model.name": "llama"},
    {"model.name": "gpt", "model.bias": True},
    {"training.init_from": "gpt2"},
    {"dataset.train_data_path": "a.bin"},
    {"tokenizer.name": "gpt2"},
    {"fp8.amax_history_len": 16},
    {"fp8.recipe": "block"},
]


@pytest.mark.parametrize("edits", EDITS, ids=str)
def test_an_edited_copy_of_the_reference_file_means_its_edits(
    ask: Ask, edits: dict[str, object]
) -> None:
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    for key, value in edits.items():
        section, name = key.split(".")
        values[section][name] = value
    Path("my.yaml").write_text(yaml.safe_dump(values))
    copy, short = ask("my.yaml"), ask(*(f"{key}={value}" for key, value in edits.items()))
    assert (copy.config, copy.given, copy.notes) == (short.config, short.given, short.notes)


SUPERSEDED = [  # a file, what comes later, what the file's value becomes, a note
    (
        "model: {mlp_internal_dim_multiplier: 64}",
        ["model.name=gpt"],
        {"model.mlp_internal_dim_multiplier": 128},
        "model.mlp_internal_dim_multiplier=64 of my.yaml yields to model.name=gpt: 128",
    ),
    (
        "model: {name: gpt, bias: true}\nlow_precision: {use_4bit: false}",
        ["model.name=llama"],
        {"model.bias": False, "low_precision.use_4bit": False},
        "model.bias=true of my.yaml yields to model.name=llama: false",
    ),
    (
        "schedule: {warmup_iters: 100, lr_decay_iters: 5000}\ntraining: {max_iters: 5000}",
        ["max_iters=50"],
        {"schedule.warmup_iters": 1, "schedule.lr_decay_iters": None},
        "schedule.warmup_iters=100 of my.yaml yields to training.max_iters=50: 1",
    ),
    (
        "schedule: {warmup_iters: 100, lr_decay_iters: 5000}\ntraining: {max_iters: 5000}",
        ["lr_decay_iters=50"],
        {"schedule.warmup_iters": 1, "schedule.lr_decay_iters": 50},
        "schedule.warmup_iters=100 of my.yaml yields to schedule.lr_decay_iters=50: 1",
    ),
    (
        "schedule: {lr_decay_iters: 1000}",
        ["warmup_iters=2000"],
        {"schedule.warmup_iters": 2000, "schedule.lr_decay_iters": None},
        "schedule.lr_decay_iters=1000 of my.yaml yields to schedule.warmup_iters=2000: null",
    ),
    (
        "schedule: {min_lr: 1e-4}",
        ["learning_rate=5e-5"],
        {"schedule.min_lr": None},
        "schedule.min_lr=1e-4 of my.yaml yields to training.learning_rate=5e-5: null",
    ),
    (
        "training: {tokens_per_step: 8192}",
        ["gradient_accumulation_steps=3"],
        {"training.tokens_per_step": None, "training.gradient_accumulation_steps": 3},
        "training.tokens_per_step=8192 of my.yaml yields to "
        "training.gradient_accumulation_steps=3: null",
    ),
    (
        "dataset: {train_data_path: a.bin, val_data_path: b.bin}",
        ["dataset.name=x"],
        {"dataset.train_data_path": None, "dataset.val_data_path": None, "dataset.name": "x"},
        "dataset.train_data_path=a.bin of my.yaml yields to dataset.name=x: null",
    ),
    (
        "model: {vocab_size: 256}",
        ["tokenizer.name=gpt2"],
        {"model.vocab_size": None},
        "model.vocab_size=256 of my.yaml yields to tokenizer.name=gpt2: null",
    ),
]


@pytest.mark.parametrize(("text", "argv", "expected", "note"), SUPERSEDED)
def test_what_a_later_layer_contradicts_yields_aloud_and_in_one_layer_it_is_an_error(
    ask: Ask,
    capsys: pytest.CaptureFixture[str],
    text: str,
    argv: list[str],
    expected: dict[str, object],
    note: str,
) -> None:
    Path("my.yaml").write_text(text)
    Path("later.yaml").write_text("\n".join(f"{word.replace('=', ': ')}" for word in argv))
    for words in (["my.yaml", *argv], ["my.yaml", "later.yaml"]):
        request = ask(*words)
        values = request.config.to_dict()
        found = {key: values[key.split(".")[0]][key.split(".")[1]] for key in expected}
        assert found == expected
        assert note in request.notes
    together = [
        f"{section}.{name}={to_text(value)}"
        for section, options in yaml.safe_load(text).items()
        for name, value in options.items()
        if name not in argv[0]
    ]
    complaint(ask, capsys, *together, *argv)


def test_names_of_nanogpt_without_a_file_are_said_to_make_a_bdh(ask: Ask) -> None:
    shape = ["n_layer=6", "n_head=6", "n_embd=384"]
    note = (
        "n_layer, n_head, n_embd shape a BDH (model.name=bdh, the default); a GPT: model.name=gpt"
    )
    assert ask(*shape).notes == (note,)
    Path("my.yaml").write_text("n_layer: 6")
    silent = [[*shape, "model.name=gpt"], ["my.yaml", *shape], ["n_layer=2"], ["init_from=gpt2"]]
    for argv in silent:
        assert note not in ask(*argv).notes


LATER_MISTAKES = [
    (
        "fp8: {amax_history_len: 0}",
        "fp8.amax_history_len: must be in [1, 1000000], got 0. The default is",
    ),
    ("fp8: {amax_history: 3}", "fp8.amax_history: unknown option. Did you mean amax_history_len?"),
    ("distributed: {x: 3}", "distributed.x: unknown option. See python train.py --help."),
    (
        "distributed: {strategy: fsdp}",
        "distributed.strategy: not available in this version. Set it",
    ),
    ("fp8:\n  format: e4m3\n  format: e4m3", "fp8.format: given twice (first at line 2). Keep one"),
    ("low_precision: {use_4bits: on}", "unknown option. Did you mean use_4bit?"),
    ("low_precision: {use_double_quant: [1]}", "expected true or false, got a list of 1"),
]


@pytest.mark.parametrize(("text", "message"), LATER_MISTAKES)
def test_mistakes_in_options_still_to_come_are_named(
    ask: Ask, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    Path("config.yaml").write_text(text)
    found = complaint(ask, capsys)
    assert message in found and len(found.splitlines()) == 1


def test_flags_of_other_trainers_that_are_off_may_stand(ask: Ask) -> None:
    request = ask("--use_wandb=False", "init_from=scratch", "low_precision.use_fp8=no")
    assert request.config == Config()
    assert len(request.notes) == 1


def test_hydra_is_ignored_aloud(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text('HydraConf:\n  version_base: "1.1"\n')
    assert ask().notes == ("HydraConf is ignored: there is no Hydra here",)
    Config.from_yaml("config.yaml")
    assert capsys.readouterr().err == "note: HydraConf is ignored: there is no Hydra here\n"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--help"], 0, ""),
        (["no.yaml"], 2, "no.yaml: not found. Pass --config FILE.\n"),
        (["n_embd=250"], 2, "command line: model.n_embd=250 is not divisible by model.n_head=4; "),
    ],
)
def test_a_process_answers_without_traceback_or_torch(
    argv: list[str], code: int, message: str
) -> None:
    program = (
        "import sys\nfrom config import command_line\n"
        "try: command_line(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == bool(message)
