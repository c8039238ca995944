"""Reading YAML: what values mean, and the message for every mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from config import Config, ConfigError

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Return a function that reads text (or bytes) as my.yaml, with overrides."""
    monkeypatch.chdir(tmp_path)

    def read_text(text: str | bytes, *overrides: str) -> Config:
        content = text if isinstance(text, bytes) else text.encode()
        Path("my.yaml").write_bytes(content)
        return Config.from_yaml("my.yaml", overrides)

    return read_text


def complaint(read: Read, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("6e-4", 6e-4),
        ("3.0e4", 3e4),
        ("1e9", 1e9),
        ("1E+2", 100.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+2", 2.0),
        ("1_000.5", 1000.5),
    ],
)
def test_a_number_is_read_as_a_person_means_it(read: Read, text: str, value: float) -> None:
    config = read(f"training:\n  learning_rate: {text}\n")
    assert config.training.learning_rate == value
    assert type(config.training.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [("012", 12), ("1_000", 1000), ("1e3", 1000), ("3.0e4", 30000), ("+7", 7), ("250e-1", 25)],
)
def test_a_whole_number_is_read_as_a_person_means_it(read: Read, text: str, value: int) -> None:
    assert read(f"training:\n  max_iters: {text}\n").training.max_iters == value


@pytest.mark.parametrize("word", ["true", "True", "YES", "on"])
def test_words_for_true_are_booleans(read: Read, word: str) -> None:
    assert read(f"training: {{debug: {word}}}").training.debug is True


@pytest.mark.parametrize("word", ["false", "False", "NO", "off"])
def test_words_for_false_are_booleans(read: Read, word: str) -> None:
    assert read(f"dataloader: {{shuffle: {word}}}").dataloader.shuffle is False


@pytest.mark.parametrize("word", ["null", "none", "None", "~", ""])
def test_words_for_null_clear_an_optional_value(read: Read, word: str) -> None:
    assert read(f"training:\n  test_freq: {word}\n").training.test_freq is None


@pytest.mark.parametrize("text", ["20251108_143022", "2026-11-20", "1:30", "3.10", "1e-3", "a b"])
def test_text_is_taken_as_written(read: Read, text: str) -> None:
    assert read(f"dataset: {{text_column: {text}}}").dataset.text_column == text


@pytest.mark.parametrize("text", ['"no"', "'null'", '"true"', '"12"'])
def test_quoted_words_are_text(read: Read, text: str) -> None:
    assert read(f"dataset: {{text_column: {text}}}").dataset.text_column == text[1:-1]


def test_choices_ignore_case(read: Read) -> None:
    config = read("optimizer: {name: AdamW}\nschedule: {name: 'WSD'}\nsystem: {compile: Auto}")
    assert (config.optimizer.name, config.schedule.name) == ("adamw", "wsd")
    assert config.system.compile == "auto"
    assert read("system: {compile: False}").system.compile is False


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "{}", "model:\n", "model: {}\ntraining:", "---\n...\n"]
)
def test_an_empty_file_or_section_is_the_defaults(read: Read, text: str) -> None:
    assert read(text) == Config()


def test_a_byte_order_mark_and_anchors_are_read(read: Read) -> None:
    config = read("\ufefftraining:\n  max_iters: &n 7\n  log_freq: *n\n")
    assert (config.training.max_iters, config.training.log_freq) == (7, 7)


VALUES = [  # section, line of the section, message
    ("training", "learning_rate: fast", "expected a number, got 'fast'. The default is 1e-3."),
    ("training", "learning_rate: 1e", "expected a number, got '1e'"),
    ("training", "learning_rate: true", "expected a number, got true"),
    ("training", "learning_rate: [1]", "expected a number, got a list of 1"),
    ("training", "learning_rate: {a: 1}", "expected a number, got a section"),
    ("training", 'learning_rate: "1e-3"', 'expected a number, got the text "1e-3". Remove the quo'),
    ("training", "learning_rate: nan", "must be finite, got nan"),
    ("training", "learning_rate: -.inf", "must be finite, got -.inf"),
    ("training", "learning_rate: 1e999", "must be finite, got inf"),
    ("training", "learning_rate: 0", "must be > 0, got 0.0"),
    ("training", "learning_rate:", "expected a number, got null"),
    ("training", "batch_size: 3.5", "expected a whole number or auto, got 3.5. The default is 8."),
    ("training", "batch_size: 3.0", "expected a whole number or auto, got 3.0"),
    ("training", "batch_size: 1e-3", "expected a whole number or auto, got 1e-3"),
    ("training", "batch_size: true", "expected a whole number or auto, got true"),
    ("training", "batch_size: 10:30", "expected a whole number or auto, got '10:30'"),
    ("training", "batch_size: 0x10", "expected a whole number or auto, got '0x10'"),
    ("training", "batch_size: 1__0", "expected a whole number or auto, got '1__0'"),
    ("training", "batch_size: 0", "must be >= 1, got 0."),
    ("training", "batch_size: -4", "must be >= 1, got -4."),
    ("training", "batch_size: 1e30", "must be at most 2**63 - 1, got 1000"),
    ("training", f"batch_size: {'9' * 5000}", "expected a whole number or auto, got '999"),
    (
        "training",
        'max_iters: "012"',
        'expected a whole number, got the text "012". Remove the quotes.',
    ),
    ("training", 'debug: "False"', 'expected true or false, got the text "False". Remove the quo'),
    ("training", "debug: 1", "expected true or false, got 1."),
    ("training", "debug: ~", "expected true or false, got null."),
    ("training", "checkpoint_dir: no", 'expected text, got the word no. Quote it: "no".'),
    ("training", "checkpoint_dir:", "expected text, got null. The default is checkpoints."),
    ("training", 'checkpoint_dir: ""', "must not be empty. The default is checkpoints."),
    ("training", 'checkpoint_dir: "a\\0b"', "holds the control character U+0000, got 'a\\x00b'."),
    ("training", 'checkpoint_dir: "\\ud800"', "holds the control character U+D800"),
    ("model", "dropout: 1.0", "must be in [0, 1), got 1.0. The default is 0.1."),
    ("model", "dropout: -0.1", "must be in [0, 1), got -0.1."),
    ("model", "name: bhd", "expected one of bdh, gpt, llama, got 'bhd'. Did you mean bdh?"),
    ("model", "name: rnn", "expected one of bdh, gpt, llama, got 'rnn'. The default is bdh."),
    ("model", "mlp_bias: maybe", "expected true or false, got 'maybe'. The default is null."),
    ("model", "activation: swish", "expected one of gelu, gelu_tanh, relu, got 'swish'."),
    ("model", "attention: falsh", "got 'falsh'. Did you mean flash?"),
    (
        "optimizer",
        "name: adams",
        "expected one of adamw, adamw_8bit, muon, got 'adams'. Did you mean adamw?",
    ),
    ("distributed", "backend: mpi", "expected one of auto, nccl, gloo, got 'mpi'. The default is"),
    (
        "dataset",
        "token_dtype: uint64",
        "expected one of auto, uint8, uint16, uint32, int32, int64, got 'uint64'",
    ),
    ("dataset", "on_bad_shard: skp", "expected one of error, skip, got 'skp'. Did you mean skip?"),
    ("dataloader", "num_workers: 5000", "must be in [0, 1024], got 5000."),
    ("system", "compile: maybe", "expected true, false or auto, got 'maybe'."),
    ("system", "device: cuda0", "expected auto | cpu | cuda | cuda:N | mps, got 'cuda0'."),
]


@pytest.mark.parametrize(("section", "line", "message"), VALUES)
def test_a_wrong_value_is_named_with_its_place(
    read: Read, section: str, line: str, message: str
) -> None:
    text = complaint(read, f"# first line\n{section}:\n  {line}\n")
    assert text.startswith(f"my.yaml:3: {section}.{line.split(':')[0]}: ") and message in text
    assert len(text.splitlines()) == 1 and len(text) < 200


NAMES = [  # text, place and message
    (
        "training: {learing_rate: 1}",
        "1: training.learing_rate: unknown option. Did you mean learni",
    ),
    ("training: {n_layer: 3}", "1: training.n_layer: unknown option. It belongs in section model."),
    ("model: {lerning_rate: 3}", "unknown option. Did you mean training.learning_rate?"),
    ("model: {log_intervall: 3}", "unknown option. Did you mean training.log_freq?"),
    ("training: {xyzzy: 3}", "unknown option. See python train.py --help."),
    ('training: {"a\\nb": 3}', "training.a\\x0Ab': unknown option."),
    (
        "training:\n  model:\n    n_layer: 3",
        "2: training.model: model is a section. Start its line",
    ),
    ("trainin: {x: 1}", "1: trainin: unknown section. Did you mean training?"),
    ("xyzzy: {x: 1}", "xyzzy: unknown section. Sections: model, training, optimizer"),
    ("batch_size: {x: 1}", "batch_size: is an option, not a section; got a section."),
    ("batchsize: 3", "1: batchsize: unknown option. Did you mean training.batch_size?"),
    ("name: 3", "name: names several options. Write one of model.name, optimizer.name, schedule"),
    ("training: 3", "training: expected a section ('option: value' lines below it), got 3."),
    ("training: [a]", "training: expected a section ('option: value' lines below it), got a list"),
    ("model: {}\n\nmodel:\n", "3: section model appears twice (first at line 1). Join them."),
    ("datasets: {}\ndataset: {}", "section dataset appears twice (first as datasets at line 1)"),
    (
        "training:\n  seed: 1\n  seed: 1\n",
        "3: training.seed: given twice (first at line 2). Keep one.",
    ),
    (
        "lr: 1\ntraining:\n  learning_rate: 1\n",
        "3: training.learning_rate: given twice as lr and as training.learning_rate (first at line",
    ),
    ("optimizer: {betas: [0.9]}", "optimizer.betas: expected a list of 2 numbers (optimizer.beta1"),
    (
        "optimizer: {betas: 0.9}",
        "expected a list of 2 numbers (optimizer.beta1, optimizer.beta2), ",
    ),
    ("training:\n  <<: {seed: 1}", "2: merge keys (<<) are not allowed. Write the options out."),
    ("? [a]\n: 1", "1: expected a name before the colon."),
    ("training: {'': 1}", "1: expected a name before the colon."),
]


@pytest.mark.parametrize(("text", "message"), NAMES)
def test_a_wrong_name_or_shape_is_named_with_its_place(read: Read, text: str, message: str) -> None:
    found = complaint(read, text)
    assert found.startswith("my.yaml:") and message in found
    assert len(found.splitlines()) == 1


FILES: list[tuple[str | bytes, str]] = [  # content, whole message
    ("- a\n", "my.yaml: expected sections (model:, training:, ...), found a list."),
    ("hello", "my.yaml: expected sections (model:, training:, ...), found a single value."),
    ("a:\n\tb: 1", "my.yaml:2:1: tab character; YAML wants spaces\n     b: 1\n    ^"),
    ("lr:\t1", "my.yaml:1:4: tab character; YAML wants spaces\n    lr: 1\n       ^"),
    (
        "a: b: c",
        "my.yaml:1:5: not valid YAML: mapping values are not allowed here\n    a: b: c\n        ^",
    ),
    ("lr: 1\n---\n", "my.yaml:2:1: a second document; keep one\n    ---\n    ^"),
    (b"lr: \xff", "my.yaml:1: byte 0xff at offset 4 is not UTF-8. Save the file as UTF-8."),
    ("lr: 1\0", "my.yaml:1: NUL byte at offset 5."),
    ("a: 1\nb: \x01", "my.yaml:2: the character U+0001 is not allowed in YAML."),
    ('a: "\\Uffffffff"', r"my.yaml: not valid YAML: .*"),
    ("[" * 9999, "my.yaml:1: nested more than 50 levels deep."),
    ("a: &a [*a]", "my.yaml:1: an alias (*) contains itself."),
    ("a: [" + "1, " * 20000 + "]", "my.yaml:1: refused: more than 10000 keys and values."),
    ("#" * 1_000_001, "my.yaml: refused: larger than 1000 KB."),
    (
        "training:\n  seed: !!int 3\n",
        "my.yaml:2: tags are not allowed, got !!int.",
    ),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=lambda value: repr(value)[:30])
def test_a_file_that_is_not_a_config_is_refused_in_words(
    read: Read, content: str | bytes, message: str
) -> None:
    found = complaint(read, content)
    assert found == message or (message.endswith(".*") and re.fullmatch(message, found))


def test_aliases_that_expand_without_end_are_refused(read: Read) -> None:
    lines = ["a: &a0 [1, 2]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "aliases (*) expand beyond 10000 values" in complaint(read, "\n".join(lines))


def test_a_tag_is_never_executed(read: Read) -> None:
    for call in ("os.mkdir", "pathlib.Path.mkdir"):
        text = f"training: !!python/object/apply:{call} [pwned]\n"
        found = complaint(read, text)
        assert f"tags are not allowed, got !!python/object/apply:{call}" in found
    assert not Path("pwned").exists()


def test_missing_files_and_directories_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("no.yaml", "no.yaml: not found. Pass --config FILE."),
        (".", ".: is a directory. Pass --config FILE."),
        ("a\0b", "a\\x00b: cannot be read: embedded null byte."),
        ("x" * 300, "x" * 300 + ": cannot be read: File name too long."),
    ):
        with pytest.raises(ConfigError) as caught:
            Config.from_yaml(name)
        assert str(caught.value) == message


def test_all_problems_are_told_at_once_in_the_order_of_the_lines(read: Read) -> None:
    text = "training:\n  seed: x\n  batch_size: 0\nmodell: {}\nmodel: {n_embd: 250}\nlr: off\n"
    found = complaint(read, text, "--max-iters=-1", "debug=")
    places = [line.split(": ")[0] for line in found.splitlines()]
    assert places == [*(f"my.yaml:{line}" for line in (2, 3, 4, 5, 6)), *["command line"] * 2]


def test_a_flood_of_problems_is_cut_short(read: Read) -> None:
    found = complaint(read, "\n".join(f"key{number}: 1" for number in range(150)))
    assert len(found.splitlines()) == 101 and found.endswith("... and 50 more problems")


def test_rules_are_silent_about_values_that_were_refused(read: Read) -> None:
    found = complaint(read, "model: {n_head: x, n_embd: 250}")
    assert "n_head" in found and "divisible" not in found


def test_later_files_win_and_messages_name_the_file_of_the_value(
    read: Read, tmp_path: Path
) -> None:
    from config import command_line

    (tmp_path / "one.yaml").write_text("model:\n  n_embd: 250\nseed: 5\n")
    (tmp_path / "two.yml").write_text("model:\n  n_embd: 128\nlr: 0.5\n")
    config = command_line(["one.yaml", "--config", "two.yml", "seed=6"]).config
    assert (config.model.n_embd, config.training.learning_rate) == (128, 0.5)
    assert config.training.seed == 6
