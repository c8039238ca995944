"""What the tests of settings share: a command line in an empty folder, its messages, tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from config import Config, Request, command_line
from settings.values import to_text

ROOT = Path(__file__).resolve().parents[2]
Ask = Callable[..., Request]
Complain = Callable[..., str]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Returns command_line for one line of a shell, in a folder with an empty config.yaml.

    The second argument holds files to be written first, by name.
    """
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    Path("config").mkdir()

    def ask_line(line: str = "", files: Mapping[str, str | bytes] | None = None) -> Request:
        for name, text in (files or {}).items():
            Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return command_line(shlex.split(line))

    return ask_line


@pytest.fixture
def complaint(ask: Ask, capsys: pytest.CaptureFixture[str]) -> Complain:
    """Returns the message of a command line that is refused with exit code 2."""

    def complain(line: str = "", files: Mapping[str, str | bytes] | None = None) -> str:
        with pytest.raises(SystemExit) as caught:
            ask(line, files)
        output = capsys.readouterr()
        assert caught.value.code == 2 and output.out == ""
        return output.err.strip()

    return complain


def options(config: Config) -> dict[str, Any]:
    """The options by 'section.name'."""
    return {f"{s}.{name}": value for s, o in config.to_dict().items() for name, value in o.items()}


def differences(config: Config, other: Config) -> set[str]:
    ours, others = options(config), options(other)
    return {key for key in ours if ours[key] != others[key]}


def check(config: Config, expected: str) -> None:
    """Compares options with words such as 'n_layer=6 dataset.name=null lr=1e-3', as in YAML."""
    values = options(config)
    for name, text in (word.split("=", 1) for word in expected.split()):
        keys = [key for key in values if key == name or key.endswith(f".{name}")]
        found = [f"{key}={to_text(values[key])}" for key in keys]
        assert found == [f"{key}={text}" for key in keys] and len(keys) == 1, (name, text, found)


def table(text: str) -> list[tuple[str, str]]:
    """Rows of a text: a line at the margin, and the indented lines below it, joined."""
    blocks = re.split(r"\n(?=\S)", text.strip())
    return [(head, " ".join(rest.split())) for head, _, rest in (b.partition("\n") for b in blocks)]
