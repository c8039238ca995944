"""Reading YAML: what values mean, and the message for every mistake."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ConfigError, command_line
from tests.settings.conftest import ROOT, Ask, Complain

READ: list[tuple[str, str, Any]] = [  # option, as written, value
    *(("learning_rate", text, 1e-3) for text in ("1e-3", "1E-3", ".001", "0_0.001", "+1e-3")),
    *(("learning_rate", text, 5.0) for text in ("5.", "5", "0.5e1")),
    *(("max_iters", text, 1000) for text in ("1_000", "1e3", "+1000", "01000", "10000e-1")),
    *(("debug", word, True) for word in ("true", "True", "YES", "on")),
    *(("debug", word, False) for word in ("false", "NO", "off")),
    *(("test_freq", word, None) for word in ("null", "none", "None", "~", "")),
    *(("checkpoint_dir", text, text) for text in ("20251108_1430", "1:30", "3.10", "1e-3", "a b")),
    *(("checkpoint_dir", text, text[1:-1]) for text in ('"no"', "'null'", '"12"')),
]


@pytest.mark.parametrize(("name", "text", "value"), READ)
def test_a_value_is_read_as_its_option_means_it(ask: Ask, name: str, text: str, value: Any) -> None:
    found = getattr(
        ask("my.yaml", {"my.yaml": f"training:\n  {name}: {text}\n"}).config.training, name
    )
    assert found == value and type(found) is type(value)


def test_choices_ignore_case(ask: Ask) -> None:
    text = "optimizer: {name: AdamW}\nschedule: {name: 'WSD'}\nsystem: {compile: Auto}"
    config = ask("my.yaml", {"my.yaml": text}).config
    assert (config.optimizer.name, config.schedule.name) == ("adamw", "wsd")
    assert config.system.compile == "auto"
    assert ask("my.yaml", {"my.yaml": "system: {compile: False}"}).config.system.compile is False


def test_an_empty_file_or_section_is_the_defaults(ask: Ask) -> None:
    for text in ("", "# a comment\n", "{}", "model:\n", "model: {}\ntraining:", "---\n...\n"):
        assert ask("my.yaml", {"my.yaml": text}).config == Config()


def test_a_byte_order_mark_and_anchors_are_read(ask: Ask) -> None:
    text = "\ufefftraining:\n  max_iters: &n 7\n  log_freq: *n\n"
    training = ask("my.yaml", {"my.yaml": text}).config.training
    assert (training.max_iters, training.log_freq) == (7, 7)


VALUES = [  # section, line of the section, message
    ("training", "learning_rate: fast", "expected a number, got 'fast'. The default is 1e-3."),
    ("training", "learning_rate: true", "expected a number, got true"),
    ("training", "learning_rate: [1]", "expected a number, got a list of 1"),
    ("training", "learning_rate: {a: 1}", "expected a number, got a section"),
    ("training", 'learning_rate: "1e-3"', 'expected a number, got the text "1e-3". Remove the quo'),
    ("training", "learning_rate: -.inf", "must be finite, got -.inf"),
    ("training", "learning_rate: 1e999", "must be finite, got inf"),
    ("training", "learning_rate: 0", "must be > 0, got 0.0"),
    ("training", "learning_rate:", "expected a number, got null"),
    ("training", "batch_size: 3.5", "expected a whole number or auto, got 3.5. The default is 8."),
    ("training", "batch_size: 1e-3", "expected a whole number or auto, got 1e-3"),
    ("training", "batch_size: 10:30", "expected a whole number or auto, got '10:30'"),
    ("training", "batch_size: 0x10", "expected a whole number or auto, got '0x10'"),
    ("training", "batch_size: -4", "must be >= 1, got -4."),
    ("training", "batch_size: 1e30", "must be at most 2**63 - 1, got 1000"),
    ("training", f"batch_size: {'9' * 5000}", "expected a whole number or auto, got '999"),
    ("training", 'debug: "False"', 'expected true or false, got the text "False". Remove the quo'),
    ("training", "debug: 1", "expected true or false, got 1."),
    ("training", "checkpoint_dir: no", 'expected text, got the word no. Quote it: "no".'),
    ("training", "checkpoint_dir:", "expected text, got null. The default is checkpoints."),
    ("training", 'checkpoint_dir: ""', "must not be empty. The default is checkpoints."),
    ("training", 'checkpoint_dir: "a\\0b"', "holds the control character U+0000, got 'a\\x00b'."),
    ("training", 'checkpoint_dir: "\\ud800"', "holds the control character U+D800"),
    ("model", "dropout: 1.0", "must be in [0, 1), got 1.0. The default is 0.1."),
    ("model", "name: bhd", "expected one of bdh, gpt, llama, got 'bhd'. Did you mean bdh?"),
    ("model", "name: rnn", "expected one of bdh, gpt, llama, got 'rnn'. The default is bdh."),
    ("model", "mlp_bias: maybe", "expected true or false, got 'maybe'. The default is null."),
    ("dataloader", "num_workers: 5000", "must be in [0, 1024], got 5000."),
    ("system", "compile: maybe", "expected true, false, auto or graphs, got 'maybe'."),
    ("system", "device: cuda0", "expected auto | cpu | cuda | cuda:N | mps, got 'cuda0'."),
]


@pytest.mark.parametrize(("section", "line", "message"), VALUES)
def test_a_wrong_value_is_named_with_its_place(
    complaint: Complain, section: str, line: str, message: str
) -> None:
    text = complaint("my.yaml", {"my.yaml": f"# first line\n{section}:\n  {line}\n"})
    assert text.startswith(f"my.yaml:3: {section}.{line.split(':')[0]}: ") and message in text
    assert len(text.splitlines()) == 1 and len(text) < 200


NAMES = [  # text, place and message
    ("training: {learing_rate: 1}", "1: training.learing_rate: unknown option. Did you mean learn"),
    ("training: {n_layer: 3}", "1: training.n_layer: unknown option. It belongs in section model."),
    ("model: {lerning_rate: 3}", "unknown option. Did you mean training.learning_rate?"),
    ("model: {log_intervall: 3}", "unknown option. Did you mean training.log_freq?"),
    ("training: {xyzzy: 3}", "unknown option. See python train.py --help."),
    ('training: {"a\\nb": 3}', "training.a\\x0Ab': unknown option."),
    ("training:\n  model:\n    n_layer: 3", "2: training.model: model is a section. Start its"),
    ("trainin: {x: 1}", "1: trainin: unknown section. Did you mean training?"),
    ("xyzzy: {x: 1}", "xyzzy: unknown section. Sections: model, training, optimizer"),
    ("batch_size: {x: 1}", "batch_size: is an option, not a section; got a section."),
    ("batchsize: 3", "1: batchsize: unknown option. Did you mean training.batch_size?"),
    ("name: 3", "name: names several options. Write one of model.name, optimizer.name, schedule"),
    ("training: 3", "training: expected a section ('option: value' lines below it), got 3."),
    ("training: [a]", "training: expected a section ('option: value' lines below it), got a list"),
    ("model: {}\n\nmodel:\n", "3: section model appears twice (first at line 1). Join them."),
    ("datasets: {}\ndataset: {}", "section dataset appears twice (first as datasets at line 1)"),
    ("training:\n  seed: 1\n  seed: 1\n", "3: training.seed: given twice (first at line 2). Keep"),
    (
        "lr: 1\ntraining:\n  learning_rate: 1\n",
        "3: training.learning_rate: given twice as lr and as training.learning_rate (first at line",
    ),
    ("optimizer: {betas: [0.9]}", "optimizer.betas: expected a list of 2 numbers (optimizer.beta1"),
    ("training:\n  <<: {seed: 1}", "2: merge keys (<<) are not allowed. Write the options out."),
    ("? [a]\n: 1", "1: expected a name before the colon."),
    ("training: {'': 1}", "1: expected a name before the colon."),
    (
        "training: !!python/object/apply:os.mkdir [pwned]",
        "1: tags are not allowed, got !!python/ob",
    ),
    ("training: {seed: !x 3}", "1: tags are not allowed, got !x."),
    ("fp8: {amax_history: 3}", "fp8.amax_history: unknown option. Did you mean amax_history_len?"),
    ("distributed: {x: 3}", "distributed.x: unknown option. See python train.py --help."),
    ("optimizer: {precision: bfloat16}", "optimizer.precision: not available in this version. Set"),
]


@pytest.mark.parametrize(("text", "message"), NAMES)
def test_a_wrong_name_or_shape_is_named_with_its_place(
    complaint: Complain, text: str, message: str
) -> None:
    found = complaint("my.yaml", {"my.yaml": text})
    assert found.startswith("my.yaml:") and message in found
    assert len(found.splitlines()) == 1
    assert not Path("pwned").exists()


FILES: list[tuple[str | bytes, str]] = [  # content, start of the message
    ("- a\n", "my.yaml: expected sections (model:, training:, ...), found a list."),
    ("hello", "my.yaml: expected sections (model:, training:, ...), found a single value."),
    ("a:\n\tb: 1", "my.yaml:2:1: tab character; YAML wants spaces\n    \tb: 1\n    ^"),
    (
        "a: b: c",
        "my.yaml:1:5: not valid YAML: mapping values are not allowed here\n    a: b: c\n        ^",
    ),
    ("lr: 1\n---\n", "my.yaml:2:1: a second document; keep one\n    ---\n    ^"),
    (b"lr: \xff", "my.yaml:1: byte 0xff at offset 4 is not UTF-8. Save the file as UTF-8."),
    ("a: 1\nb: \x01", "my.yaml:2: the character U+0001 is not allowed in YAML."),
    ('a: "\\Uffffffff"', "my.yaml: not valid YAML: "),
    ("[" * 9999, "my.yaml: nested too deeply"),
    ("a: &a [*a]", "my.yaml: nested too deeply, or an alias (*) contains itself."),
    ("#" * 1_000_001, "my.yaml: refused: larger than 1000 KB."),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=lambda value: repr(value)[:30])
def test_a_file_that_is_not_a_config_is_refused_in_words(
    complaint: Complain, content: str | bytes, message: str
) -> None:
    assert complaint("my.yaml", {"my.yaml": content}).startswith(message)


def test_aliases_that_double_forty_times_are_answered_at_once(complaint: Complain) -> None:
    lines = ["a: &a0 [1, 2]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "a39: unknown option" in complaint("my.yaml", {"my.yaml": "\n".join(lines)})


def test_missing_files_and_directories_are_named(ask: Ask) -> None:
    ask()
    for name, message in (
        ("no.yaml", "no.yaml: not found. Pass --config FILE."),
        (".", ".: is a directory. Pass --config FILE."),
        ("a\0b", "a\\x00b: cannot be read: embedded null byte."),
    ):
        with pytest.raises(ConfigError) as caught:
            Config.from_yaml(name)
        assert str(caught.value) == message


def test_all_problems_are_told_at_once_in_the_order_of_the_lines(complaint: Complain) -> None:
    text = "training:\n  seed: x\n  batch_size: 0\nmodell: {}\nmodel: {n_embd: 250}\nlr: off\n"
    found = complaint("my.yaml --max-iters=-1 debug=", {"my.yaml": text})
    places = [line.split(": ")[0] for line in found.splitlines()]
    assert places == [*(f"my.yaml:{line}" for line in (2, 3, 4, 5, 6)), *["command line"] * 2]
    found = complaint("my.yaml", {"my.yaml": "\n".join(f"key{number}: 1" for number in range(150))})
    assert len(found.splitlines()) == 101 and found.endswith("... and 50 more problems")


def test_rules_are_silent_about_values_that_were_refused(complaint: Complain) -> None:
    found = complaint("my.yaml", {"my.yaml": "model: {n_head: x, n_embd: 250}"})
    assert "n_head" in found and "divisible" not in found


# --- whatever a file or a command line holds: a Config or a ConfigError, never anything else ------

SNIPPETS = [b"&a ", b"*a", b"!!int ", b"!x", b"[", b"{", b"}", b"- ", b"? ", b": ", b"|\n", b">"]
SNIPPETS += [b"'", b'"\\U00110000"', b"\t", b"\0", b"\xff", b"\xc2\x85", b"%YAML 9.9\n---\n"]
SNIPPETS += [b"<<: *a", b"lr: 3\n", b"datasets:\n", b"betas: [1, 2]\n", b"1e99999", b"-", b"\r"]


def mutated(kind: str, lines: list[bytes], chance: random.Random) -> list[bytes]:
    place = chance.randrange(len(lines))
    before, line, after = lines[:place], lines[place], lines[place + 1 :]
    column = chance.randrange(len(line))
    if kind == "flip a byte":
        line = line[:column] + bytes([chance.randrange(256)]) + line[column + 1 :]
    elif kind == "duplicate a line":
        before.append(chance.choice(lines))
    elif kind == "remove a line":
        line = b""
    elif kind == "indent a line":
        line = b" " * chance.randrange(6) + line.lstrip(b" ")
    elif kind == "insert":
        line = line[:column] + chance.choice(SNIPPETS) + line[column:]
    else:  # truncate the file
        line, after = line[: 1 + column], []
    return [*before, *([line] if line else []), *after]


KINDS = ["flip a byte", "duplicate a line", "remove a line", "indent a line", "insert", "truncate"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_in_words(kind: str, tmp_path: Path) -> None:
    source = (ROOT / "config.yaml").read_bytes().splitlines(keepends=True)
    path, refused = tmp_path / "my.yaml", 0
    for seed in range(100):
        chance = random.Random(seed)
        lines = [line for line in source if not line.startswith(b"#")]
        for _ in range(1 + seed % 3):
            lines = mutated(kind, lines, chance)
        path.write_bytes(b"".join(lines))
        try:
            assert isinstance(Config.from_yaml(path), Config)
        except ConfigError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 0 or kind == "remove a line"


@pytest.mark.slow
@given(st.text(max_size=60) | st.text("a:{}[]&*!|>'\"#%@`,?- \n\t<.~0", max_size=40))
@settings(max_examples=70, deadline=None)
def test_any_text_is_read_or_refused_in_words(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        Config.from_yaml(path)
    except ConfigError as error:
        assert str(error)


WORDS = ["--lr", "lr=3", "--debug", "x.yaml", "--", "-", "=", "--=", "a=b", "betas=[", "model={}"]
WORDS += ["a.py", "bias=1", "--flex", "flash=on", "train_data_path=a.ids", "val_data_path=b.ids"]
WORDS += ["gradient_accumulation_steps=2", "max_iters=5", "datasets.path=x", "wandb_log.name=x"]
WORDS += ["--config", "--model.", "model.=3", "dataset=x", "--training.lr", "HydraConf=1", "--d-e"]


@pytest.mark.slow
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=5))
@settings(max_examples=70, deadline=None)
def test_any_command_line_is_read_or_refused_with_exit_code_2(argv: list[str]) -> None:
    try:
        command_line(argv)
    except SystemExit as left:
        assert left.code == 2 or "-h" in argv or "--help" in argv
