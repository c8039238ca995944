"""Whatever a file or a command line holds: a Config or a ConfigError, never anything else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ConfigError, command_line

SOURCE = (Path(__file__).resolve().parents[2] / "config.yaml").read_bytes()
SNIPPETS = [
    b"&a ",
    b"*a",
    b"!!int ",
    b"!x",
    b"[",
    b"{",
    b"}",
    b"- ",
    b"? ",
    b": ",
    b"|\n",
    b">",
    b"'",
]
SNIPPETS += [b'"\\U00110000"', b"\t", b"\0", b"\xff", b"\xc2\x85", b"%YAML 9.9\n---\n", b"<<: *a"]
SNIPPETS += [
    b"lr: 3\n",
    b"datasets:\n",
    b"betas: [1, 2]\n",
    b"1e99999",
    b"-",
    b"\r",
    b"\xef\xbb\xbf",
]


def flip_byte(lines: list[bytes], chance: random.Random) -> None:
    place = chance.randrange(len(lines))
    content = bytearray(lines[place])
    content[chance.randrange(len(content))] = chance.randrange(256)
    lines[place] = bytes(content)


def duplicate_line(lines: list[bytes], chance: random.Random) -> None:
    lines.insert(chance.randrange(len(lines)), chance.choice(lines))


def remove_line(lines: list[bytes], chance: random.Random) -> None:
    lines.pop(chance.randrange(len(lines)))


def reindent_line(lines: list[bytes], chance: random.Random) -> None:
    place = chance.randrange(len(lines))
    lines[place] = b" " * chance.randrange(6) + lines[place].lstrip(b" ")


def insert_snippet(lines: list[bytes], chance: random.Random) -> None:
    place = chance.randrange(len(lines))
    column = chance.randrange(len(lines[place]))
    lines[place] = lines[place][:column] + chance.choice(SNIPPETS) + lines[place][column:]


def truncate(lines: list[bytes], chance: random.Random) -> None:
    place = chance.randrange(len(lines))
    lines[place] = lines[place][: 1 + chance.randrange(len(lines[place]))]
    del lines[place + 1 :]


MUTATIONS: list[Callable[[list[bytes], random.Random], None]] = [
    flip_byte,
    duplicate_line,
    remove_line,
    reindent_line,
    insert_snippet,
    truncate,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda function: function.__name__)
def test_a_mutated_file_is_read_or_refused_in_words(
    mutation: Callable[[list[bytes], random.Random], None], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    refused = 0
    for seed in range(100):
        chance = random.Random(seed)
        lines = [line for line in SOURCE.splitlines(keepends=True) if not line.startswith(b"#")]
        for _ in range(1 + seed % 3):
            mutation(lines, chance)
        path.write_bytes(b"".join(lines))
        try:
            assert isinstance(Config.from_yaml(path), Config)
        except ConfigError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 0 or mutation is remove_line


@given(st.text(max_size=60) | st.text("a:{}[]&*!|>'\"#%@`,?- \n\t<.~0", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused_in_words(tmp_path_factory: object, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"  # type: ignore[attr-defined]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        Config.from_yaml(path)
    except ConfigError as error:
        assert str(error)


WORDS = ["--lr", "lr=3", "--debug", "x.yaml", "--", "-", "=", "--=", "a=b", "betas=[", "model={}"]
WORDS += ["a.py", "bias=1", "--flex", "flash=on", "train_data_path=a.ids", "val_data_path=b.ids"]
WORDS += ["gradient_accumulation_steps=2", "max_iters=5", "datasets.path=x", "wandb_log.name=x"]
WORDS += ["--config", "--model.", "model.=3", "dataset=x", "--training.lr", "HydraConf=1", "--d-e"]


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_command_line_is_read_or_refused_with_exit_code_2(argv: list[str]) -> None:
    try:
        command_line(argv)
    except SystemExit as left:
        assert left.code == 2 or "-h" in argv or "--help" in argv
