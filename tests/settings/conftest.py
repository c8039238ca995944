"""What the tests of settings share: a command line in an empty folder, and its complaints."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import Config, Request, command_line

ROOT = Path(__file__).resolve().parents[2]
Ask = Callable[..., Request]
Complain = Callable[..., str]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Returns command_line for one line of a shell, in a folder with an empty config.yaml.

    Files to be written first are keyword arguments, `__` in place of the dot: my__yaml="seed: 3".
    """
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    Path("config").mkdir()

    def ask_line(line: str = "", **files: str | bytes) -> Request:
        for name, text in files.items():
            content = text if isinstance(text, bytes) else text.encode()
            Path(name.replace("__", ".")).write_bytes(content)
        return command_line(shlex.split(line))

    return ask_line


@pytest.fixture
def complaint(ask: Ask, capsys: pytest.CaptureFixture[str]) -> Complain:
    """Returns the message of a command line that is refused with exit code 2."""

    def complain(line: str = "", **files: str | bytes) -> str:
        with pytest.raises(SystemExit) as caught:
            ask(line, **files)
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


def check(config: Config, **expected: Any) -> None:
    """Options by bare name, or with `__` for the dot."""
    values = options(config)
    for name, value in expected.items():
        dotted = name.replace("__", ".")
        keys = [key for key in values if key == dotted or key.endswith(f".{dotted}")]
        assert len(keys) == 1 and values[keys[0]] == value, (keys, values[keys[0]], value)
