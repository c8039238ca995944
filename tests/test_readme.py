"""README and docs say what is so: commands parse, files and links exist, the tree is the tree."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

import export
import prepare
import runs
import sample
import sweep
from config import Config, command_line
from sweeps.cells import make_cells
from sweeps.sweep_file import read_sweep
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join((README, *GUIDES))
BETWEEN_COMMANDS = {"&&", "||", ";", "|"}


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of one language; '' for those without."""
    found: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
    return [content for name, content in found if name == language]


def commands() -> list[list[str]]:
    """The words of every shell command, in order."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            lexer.commenters = "#"
            words = groupby(lexer, lambda word: word in BETWEEN_COMMANDS)
            found += [list(group) for between, group in words if not between]
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def check_train(arguments: list[str]) -> None:
    try:
        command_line(arguments)
    except SystemExit as left:
        assert left.code == 0, arguments


def check_module(arguments: list[str]) -> None:
    assert importlib.util.find_spec(arguments[0]) is not None


def check_python(arguments: list[str]) -> None:
    scripts: dict[str, Callable[[list[str]], object]] = {
        "train.py": check_train,
        "launch.py": check_torchrun,
        "sample.py": sample.read_arguments,
        "prepare.py": check_prepare,
        "export.py": export.read_arguments,
        "runs.py": runs.read_arguments,
        "sweep.py": check_sweep,
        "-m": check_module,
    }
    assert arguments[0] in scripts, f"python {arguments[0]}: this test does not know it"
    scripts[arguments[0]](arguments[1:])


def check_prepare(arguments: list[str]) -> None:
    assert prepare.main(arguments) == 0


def check_sweep(arguments: list[str]) -> None:
    assert make_cells(read_sweep(sweep.read_arguments(arguments).file))


def check_torchrun(arguments: list[str]) -> None:
    place = arguments.index("train.py")
    assert arguments[:place] == ["--standalone", "--nproc_per_node=2"]
    check_train(arguments[place + 1 :])


def check_make(arguments: list[str]) -> None:
    assert set(arguments) <= make_targets()


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for flag, name in zip(arguments, arguments[1:], strict=False):
        assert flag != "-r" or (ROOT / name).is_file()


def check_bash(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file()


def check_copy(arguments: list[str]) -> None:
    source, target = arguments
    shutil.copy(source, target)


def check_source(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"]


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "python3": check_python,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "bash": check_bash,
    "cp": check_copy,
    ".": check_source,
}


def test_every_command_means_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the README, in a folder like a fresh checkout; nothing is trained."""
    shutil.copy(ROOT / "config.yaml", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for block in blocks("yaml"):
        named = re.match(r"# (\w+\.yaml)$", block, re.M)
        if named is not None:
            Path(named[1]).write_text(block, encoding="utf-8")
    for name in ("write_parquet", "write_tokens", "train_tokenizer"):
        monkeypatch.setattr(prepare, name, lambda _: None)
    assert len(commands()) >= 5
    for program, *arguments in commands():
        assert program in CHECKS, f"{program}: this test does not know it"
        CHECKS[program](arguments)


def test_targets_of_make_that_the_text_names_exist() -> None:
    named = set(re.findall(r"`make ([a-z]+)", TEXT))
    assert named <= make_targets() and {"help", "demo", "test"} <= make_targets()


def test_options_shown_as_yaml_are_read(tmp_path: Path) -> None:
    configs = [block for block in blocks("yaml") if "\nbase:" not in block]  # no sweeps
    for number, block in enumerate(configs):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert Config.from_yaml(path) != Config()


def tree_block() -> str:
    return next(block for block in blocks("") if re.search(r"^train\.py ", block, re.M))


def test_the_tree_names_nothing_that_is_not_there() -> None:
    names = re.findall(r"^(\S+)  ", tree_block(), re.M)
    assert len(names) >= 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_tree_names_all_that_is_tracked() -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0 or not listing.stdout:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in listing.stdout.split("\0") if name}
    named = set(re.findall(r"[\w.-]+", tree_block()))
    hidden = {name for name in tops if name.startswith(".")}
    assert sorted(tops - hidden - named - {"README.md"}) == []


def test_links_lead_to_files() -> None:
    for folder, text in [(ROOT, README), *((ROOT / "docs", guide) for guide in GUIDES)]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 900
