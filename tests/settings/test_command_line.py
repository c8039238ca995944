"""The command line: every spelling, aliases, names without an option, and each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import Config, ConfigError
from engine.planning.summary import origin_lines
from settings import names
from settings.foreign import fivezeroes_bdh
from tests.settings.conftest import ROOT, Ask, Complain, check, options

SPELLINGS = [
    *("learning_rate=3e-4", "training.learning_rate=3e-4", "--learning_rate=3e-4", "--lr 3e-4"),
    *("--learning-rate=3e-4", "--learning_rate 3e-4", "--training.learning-rate 3e-4", "lr=3e-4"),
    *("optimizer.lr=3e-4", "lr=3e-4 --lr 0.0003"),
]


def test_every_spelling_of_an_override_means_the_same(ask: Ask) -> None:
    for line in SPELLINGS:
        request = ask(line)
        check(request.config, "learning_rate=3e-4")
        assert Config.from_yaml("config.yaml", line.split()) == request.config
        assert Config.from_yaml("config.yaml", request.overrides) == request.config


SMALL = [  # what is typed, a value
    *((line, "debug=true") for line in ("--debug", "--debug --seed=3", "--debug seed=3")),
    *((line, "debug=true") for line in ("--debug config.yaml", "--debug on")),
    *((f"test_freq={word}", "test_freq=null") for word in ("null", "None", "'~'")),
    ("\"text_column='no'\"", 'text_column="no"'),
    *((line, "beta1=0.8 beta2=0.99") for line in ("betas=[0.8,0.99]", "optimizer.betas=.8,.99")),
    ("--use_wandb=False low_precision.use_fp8=no", "wandb_log=false use_fp8=false"),
]


def test_flags_words_quotes_and_lists(ask: Ask) -> None:
    for line, value in SMALL:
        check(ask(line).config, value)


def test_files_are_applied_in_order_wherever_they_stand(ask: Ask) -> None:
    files = {"one.yaml": "seed: 1\nlr: 2.0", "lr=2.yml": "seed: 2", "OTHER.YML": "seed: 4"}
    request = ask("--config=one.yaml log_freq=7 ./lr=2.yml --dry-run", files)
    check(request.config, "training.seed=2 learning_rate=2.0 log_freq=7")
    assert request.files == ("one.yaml", "./lr=2.yml") and request.overrides == ("log_freq=7",)
    assert request.dry_run and not ask().dry_run and not ask("dry_run=false").dry_run
    for word in ("--dryrun", "--dry_run", "dry_run=true", "--dry-run=yes"):
        assert ask(word).dry_run
    check(ask("OTHER.YML").config, "training.seed=4")
    assert ask().files == ("config.yaml",)
    Path("config.yaml").unlink()
    assert ask("", {"config.yml": "seed: 3"}).files == ("config.yml",)


WORDS = [  # what is typed, what it means, what is said of the value
    ("device=gpu", "system.device=cuda", "system.device=gpu is read as system.device=cuda"),
    ("dtype=fp32", "compute_dtype=float32", "fp32 is read as low_precision.compute_dtype=float"),
    ("optimizer=adam", "", "optimizer.name=adam is read as optimizer.name=adamw"),
    ("--resume", "resume_from_checkpoint=auto", "=true is read as training.resume_from_checkpo"),
    ("--resume a/b.pt", "resume_from_checkpoint=a/b.pt", "resume is read as training.resume"),
    ("--resume my.yaml", "my.yaml resume_from_checkpoint=auto", "=true is read as"),
]


def test_words_that_people_type_are_taken_and_what_they_mean_is_said(ask: Ask) -> None:
    for typed, meant, note in WORDS:
        request = ask(typed, {"my.yaml": "seed: 3"})
        assert request.config == ask(meant).config
        assert any(note in line for line in request.notes)


TWICE = [
    ("batch_size=8", "batch_size=16", "training.batch_size: given twice: 8 and 16. The last one"),
    (
        *("lr=1e-4", "learning_rate=2e-4"),
        "training.learning_rate: given twice as lr and as learning_rate: 1e-4 and 2e-4. The last",
    ),
]


def test_of_a_flag_given_twice_the_last_is_taken_and_said(ask: Ask) -> None:
    for first, last, note in TWICE:
        request = ask(f"{first} {last}")
        assert sum(line.startswith(note) for line in request.notes) == 1
        assert request.config == ask(last).config
        assert Config.from_yaml("config.yaml", request.overrides) == request.config
    notes = ask("lr=1e-4 lr=1e-4 lr=2e-4").notes
    assert sum("given twice" in note for note in notes) == 1


MISTAKES = [
    ("--lrr 3", "--lrr: unknown option. Did you mean training.learning_rate?"),
    ("training.learing_rate=3", "training.learing_rate: unknown option. Did you mean learning_"),
    ("trainin.seed=3", "trainin: unknown section. Did you mean training?"),
    ("model.seed=3", "model.seed: unknown option. It belongs in section training."),
    ("--xyzzy", "--xyzzy: unknown option. See python train.py --help."),
    ("-lr lr=3", "'-lr': unknown option. Did you mean training.learning_rate?"),
    ("batch_size=", "batch_size=: empty value. Write batch_size=null to clear"),
    ("--batch_size --debug", "--batch_size: a value is missing. Write --batch_size=VALUE."),
    ("--weight_decay -1", "training.weight_decay: must be >= 0, got -1"),
    ("--gpu", "--gpu: unknown option. Write device=cuda."),
    ("cuda:0", "'cuda:0': not key=value. Write device=cuda."),
    ("--num_gpus=8", "num_gpus: unknown option. Start it with torchrun --nproc_per_node=N."),
    ("data=x", "data: unknown option. Write parquet_dir=FOLDER for text, train_data_path=FILE"),
    ("name=bdh", "name: names several options. Write one of model.name, optimizer.name, sch"),
    ("training=8", "training: is a section. Write training.OPTION=value."),
    ("'a b'", "'a b': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    ("''", "'': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    ("\udcff=1", "'\\uDCFF=1': neither a config file (*.yaml, *.yml, *.py) nor key=value."),
    ("--config", "--config: the name of a file is missing."),
    ("--config=", "--config: the name of a file is missing."),
    ("--dry-run=1", "--dry-run takes no value."),
    ("--check-resume=1", "--check-resume=1: a number of steps, at least 2."),
    ("--dry-run --check-resume", "--dry-run and --check-resume exclude each other."),
    ("--reproduce", "--reproduce: name a run, a checkpoint, its config.yaml or a report page."),
    ("--reproduce a lr=3", "--reproduce repeats a run as it was: give it alone, without files, o"),
    ("--reproduce=a --dry-run", "--reproduce repeats a run as it was: give it alone, without "),
    ("checkpoint_dir=no", "training.checkpoint_dir: expected text, got the word no. Quote it"),
    ("betas=0.9", "betas: expected a list of 2 numbers (optimizer.beta1, optimizer.beta2), got "),
    ("max_iters=ten", "training.max_iters: expected a whole number, got 'ten'. The default is"),
    ("lr=fast", "training.learning_rate (given as lr): expected a number, got 'fast'."),
]


def test_each_mistake_on_the_command_line_has_its_message(complaint: Complain) -> None:
    for line, message in MISTAKES:
        found = complaint(line)
        assert found.startswith(f"command line: {message}") and len(found.splitlines()) == 1


def test_a_run_to_reproduce_stands_alone_and_no_config_is_read(
    ask: Ask, complaint: Complain, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("--reproduce run_a", "--reproduce=run_a"):
        request = ask(line, {"config.yaml": "not: [valid"})
        assert request.reproduce == "run_a" and request.config == Config()
    assert ask("", {"config.yaml": ""}).reproduce is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert complaint("--reproduce run_a").startswith("--reproduce repeats a run in one process: ")


def test_without_config_yaml_a_file_is_asked_for_unless_names_choose_one(
    ask: Ask, complaint: Complain
) -> None:
    Path("config.yaml").unlink()
    assert complaint() == "config.yaml: not found. Pass --config FILE."
    check(ask("dataset=x").config, "dataset.name=x model.name=gpt")


def test_files_and_switches_are_no_overrides_of_a_file(ask: Ask) -> None:
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
    for section, own in Config().to_dict().items():
        assert f"\n{section}: " in text
        assert all(f"\n  {name} " in text for name in own)
    assert "config/train_gpt2.py" in text and "never run" in text and "configs/nanogpt.yaml" in text


# These mean more than the option: test_nanogpt.py, test_dialects.py.
MEAN_MORE = ("dataset", "wandb_log.name", *fivezeroes_bdh.MARKS)
OTHERS = """
    model.name=gpt optimizer.name=muon schedule.name=linear tokenizer.name=gpt2 model.n_head=8
    model.dropout=0.25 dataloader.shuffle=false training.block_size=64 logging.wandb_log=true
    low_precision.compute_dtype=float32 training.resume_from_checkpoint=a/b.pt
    dataset.test_fraction=0.25 distributed.backend=gloo
"""  # 64 and 512 are not values of theirs, or are the default


def test_an_alias_sets_the_option_it_stands_for_and_says_so(ask: Ask) -> None:
    values = dict(word.split("=") for word in OTHERS.split())
    for alias, key in names.TARGETS.items():
        if alias not in MEAN_MORE:
            value = values.get(key, "64" if key.startswith("training.") else "512")
            meant = ask(f"{key}={value}").config
            assert meant != Config()
            notes = () if key.endswith(f".{alias}") else (f"{alias} is read as {key}",)
            from_line = ask(f"{alias}={value}")
            assert (from_line.config, from_line.notes) == (meant, notes)
            section, _, name = alias.rpartition(".")
            text = f"{section}:\n  {name}: {value}" if section else f"{name}: {value}"
            from_file = ask("my.yaml", {"my.yaml": text})
            assert (from_file.config, from_file.notes) == (meant, notes)


def test_an_alias_may_stand_in_the_section_of_its_option(ask: Ask) -> None:
    text = "model: {d_model: 128, num_heads: 2}\ntraining: {lr: 0.5}"
    check(ask("my.yaml", {"my.yaml": text}).config, "n_embd=128 n_head=2 learning_rate=0.5")


def test_every_alias_stands_for_an_option_that_exists() -> None:
    own, others = set(options(Config())), {*names.UNSUPPORTED, *names.EXTRA_OPTIONS}
    assert not own & others
    assert set(names.ALIASES) <= own
    assert not set(names.TARGETS) & (own | others)
    assert {"mlp_internal_dim_multiplier", "mlp_scale_factor", "d_ff"}.isdisjoint(names.TARGETS)


def test_an_option_that_this_version_lacks_is_refused_unless_it_asks_for_nothing(
    ask: Ask, complaint: Complain
) -> None:
    for key, harmless in names.UNSUPPORTED.items():
        text = f"{key.replace('.', ':' + chr(10) + '  ')}: "
        message = f"my.yaml:2: {key}: not available in this version. Set it to {harmless[0]}."
        assert complaint("my.yaml", {"my.yaml": f"{text}something\n"}) == message
        for value in harmless:
            request = ask("my.yaml", {"my.yaml": text + value})
            assert request.notes == (f"{key}={value} changes nothing in this version",)
            assert request.config == Config()


LOW_PRECISION = """
low_precision: {use_fp8: false, use_4bit: true, use_4bit_optimizer: false,
  quantization_type: "nf4", use_double_quant: true, compute_dtype: "bfloat16"}
fp8: {format: hybrid, amax_history_len: 1024, amax_compute_algo: max}
"""
WISHES: list[tuple[str, str, set[str]]] = [  # a file, the command line, what the user asked for
    ("", "", set()),
    (LOW_PRECISION, "", set()),
    ("low_precision: {use_4bit: auto}", "model.name=gpt", {"model.name"}),
    (LOW_PRECISION, "model.name=gpt", {"model.name", "low_precision.use_4bit"}),
    ("", "use_4bit=true model.name=llama", {"model.name", "low_precision.use_4bit"}),
    ("", "use_4bit=false model.name=llama", {"model.name"}),
    ("", "use_4bit=false", {"low_precision.use_4bit"}),
    ("", "tokenizer.name=bytes vocab_size=256", set()),
    ("", "fp8.recipe=delayed amax_history_len=8", {"fp8.amax_history_len"}),
    ("dataset: x", "n_layer=12", {"dataset.name"}),  # as its base has it
    ("dataset: x", "n_layer=6", {"dataset.name", "model.n_layer"}),
]


def test_a_value_that_would_be_the_same_if_left_out_is_no_wish(ask: Ask) -> None:
    for text, line, given in WISHES:
        assert ask(f"my.yaml {line}", {"my.yaml": text}).given == given
    documented = ask("my.yaml", {"my.yaml": LOW_PRECISION})
    assert documented.config == Config() and not documented.notes


EDITS = [
    *("", "model.name=llama", "model.name=gpt model.bias=true", "training.init_from=gpt2"),
    *("dataset.train_data_path=a.bin", "tokenizer.name=gpt2", "fp8.amax_history_len=16"),
    "fp8.recipe=block",
]


def test_an_edited_copy_of_the_reference_file_means_its_edits(ask: Ask) -> None:
    for edits in EDITS:
        values = yaml.safe_load((ROOT / "config.yaml").read_text())
        for word in edits.split():
            key, value = word.split("=")
            section, name = key.split(".")
            values[section][name] = yaml.safe_load(value)
        copy, short = ask("my.yaml", {"my.yaml": yaml.safe_dump(values)}), ask(edits)
        assert (copy.config, copy.given, copy.notes) == (short.config, short.given, short.notes)


SCHEDULE = "schedule.warmup_iters=100 schedule.lr_decay_iters=5000 training.max_iters=5000"
TOKEN_FILES = "dataset.train_data_path=a.bin dataset.val_data_path=b.bin"
SUPERSEDED = [  # a file, what comes later, what the file's values become
    ("model.mlp_internal_dim_multiplier=64", "model.name=gpt", "mlp_internal_dim_multiplier=128"),
    (
        *("model.name=gpt model.bias=true low_precision.use_4bit=false", "model.name=llama"),
        "bias=false use_4bit=false",
    ),
    (SCHEDULE, "training.max_iters=50", "warmup_iters=1 lr_decay_iters=null"),
    ("schedule.warmup_iters=100", "schedule.lr_decay_iters=50", "warmup_iters=1"),
    ("schedule.lr_decay_iters=1000", "schedule.warmup_iters=2000", "lr_decay_iters=null"),
    ("schedule.min_lr=0.1", "training.learning_rate=0.05", "min_lr=null"),
    (
        "training.tokens_per_step=8192",
        "training.gradient_accumulation_steps=3",
        "tokens_per_step=null",
    ),
    (TOKEN_FILES, "dataset.name=x", "train_data_path=null"),
    ("model.vocab_size=256", "tokenizer.name=gpt2", "vocab_size=null"),
]


@pytest.mark.parametrize(("earlier", "later", "becomes"), SUPERSEDED)
def test_what_a_later_layer_contradicts_yields_aloud_and_in_one_layer_it_is_an_error(
    ask: Ask, complaint: Complain, earlier: str, later: str, becomes: str
) -> None:
    sections: dict[str, list[str]] = {}
    for word in earlier.split():
        section, name = word.replace("=", ": ").split(".", 1)
        sections.setdefault(section, []).append(name)
    text = "\n".join(f"{name}: {{{', '.join(own)}}}" for name, own in sections.items())
    for line in (f"my.yaml {later}", "my.yaml later.yaml"):
        request = ask(line, {"my.yaml": text, "later.yaml": later.replace("=", ": ")})
        check(request.config, f"{later} {becomes}")
        for name, now in (word.split("=") for word in becomes.split()):
            was = next(word for word in earlier.split() if f".{name}=" in word)
            note = f"{was} of my.yaml yields to {later}: {now}"
            assert (note in request.notes) == (not was.endswith(f"={now}"))
    key = later.split("=")[0]
    complaint(" ".join([later, *(w for w in earlier.split() if w.split("=")[0] != key)]))


def test_hydra_is_ignored_and_a_note_goes_to_stderr(
    ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "HydraConf is ignored: there is no Hydra here"
    assert ask("", {"config.yaml": 'HydraConf:\n  version_base: "1.1"\n'}).notes == (note,)
    Config.from_yaml("config.yaml")
    assert capsys.readouterr().err == f"note: {note}\n"


@pytest.mark.slow
def test_a_process_answers_without_traceback_or_torch() -> None:
    program = (
        "import sys\nfrom config import command_line\n"
        "try: command_line(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)\n"
    )
    for word, code, message in (
        ("--help", 0, ""),
        ("no.yaml", 2, "no.yaml: not found. Pass --config FILE.\n"),
        ("n_embd=250", 2, "command line: model.n_embd=250 is not divisible by model.n_head=4; "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, word], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code
        assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == bool(message)


def test_no_note_on_an_address_that_gives_way_shows_its_password(ask: Ask) -> None:
    address = "https://me:secret@host/text"
    mixture = f'[{{name: a, weight: 1, parquet_dir: "{address}"}}]'
    for given in (f'train_data_path: "{address}"', f"mixture: {mixture}"):
        request = ask("my.yaml parquet_dir=x", {"my.yaml": f"dataset: {{{given}}}"})
        assert request.notes and "secret" not in "".join(request.notes)
    request = ask(f"parquet_dir={address} parquet_dir=x")
    assert request.notes and "secret" not in "".join(request.notes)
    assert "secret" not in "".join(origin_lines(request))


@pytest.mark.parametrize(
    "word", ["cache_bytes={}", "attention={}", "--config={}", "{}", "no_option={}", "lr={}"]
)
def test_no_message_shows_a_password_of_an_address(complaint: Complain, word: str) -> None:
    for address in (
        *("https://me:secret@host/x.yaml", "s3://me:se/cret@bucket", "https:/me:secret@host/x"),
        *("https://h/x?Signature=secret", f"https://me:secret{'x' * 60}@host/x"),
    ):
        assert "cret" not in complaint(word.format(address)), address
