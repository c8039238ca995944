"""Reads a YAML file into entries that remember their lines, and builds no Python objects.

PyYAML's node graph gives a line to every key and the raw text of every scalar. What a scalar means
is decided later, by the type of its option. Nothing is constructed, so nothing is ever executed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TypeAlias

import yaml

from files.regular import open_regular
from settings.errors import Origin, Problem
from settings.values import Scalar, one_line

MAX_BYTES = 1_000_000
_STANDARD_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` as written in a file, on the command line or in a checkpoint."""

    key: str  # 'lr', 'training.lr' or a section's name
    value: Value
    origin: Origin


@dataclass(frozen=True, slots=True)
class Items:
    """A YAML list."""

    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A YAML mapping."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class PythonValue:
    """A value that has a type already: from a checkpoint, or from a Python preset."""

    value: object


Value: TypeAlias = "Scalar | Items | Group | PythonValue"


class UnreadableError(Exception):
    """A file that cannot be read as entries at all."""

    def __init__(self, text: str, line: int = 0, column: int = 0) -> None:
        super().__init__(text)
        self.line = line
        self.column = column


def read_file(path: str | os.PathLike[str], layer: int) -> tuple[list[Entry], list[Problem]]:
    """Returns the top-level entries of a YAML file and what is wrong with its form."""
    origin = Origin(layer, source=os.fspath(path))
    problems: list[Problem] = []
    try:
        node = _compose(read_text(origin.source))
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
            return [], problems
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise UnreadableError(f"expected sections (model:, training:, ...), found {kind}")
        group = _Converter(origin, problems).convert_mapping(node)
    except UnreadableError as error:
        place = replace(origin, line=error.line, column=error.column)
        return [], [Problem(place, str(error))]
    except RecursionError:
        return [], [Problem(origin, "nested too deeply, or an alias (*) contains itself")]
    return list(group.entries), problems


def read_text(name: str, max_bytes: int = MAX_BYTES) -> str:
    """Returns the text of a file of limited size; raises UnreadableError."""
    try:
        # A pipe is read only where the command line names one: <(...) of a shell, /dev/stdin.
        opener = None if name.startswith("/dev/") else open_regular
        with open(name, "rb", opener=opener) as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise UnreadableError("not found. Pass --config FILE") from None
    except IsADirectoryError:
        raise UnreadableError("is a directory. Pass --config FILE") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableError(f"cannot be read: {reason}") from None
    if len(content) > max_bytes:
        raise UnreadableError(f"refused: larger than {max_bytes // 1000} KB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        message = f"byte 0x{byte:02x} at offset {error.start} is not UTF-8. Save the file as UTF-8"
        raise UnreadableError(message, line) from None


def _compose(text: str) -> yaml.Node | None:
    """Returns the root of PyYAML's node graph, or None for an empty file."""
    try:
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(text[error.position])
        raise UnreadableError(f"the character U+{code:04X} is not allowed in YAML", line) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UnreadableError(f"not valid YAML: {one_line(str(error))}") from None


def _syntax_error(error: yaml.MarkedYAMLError) -> UnreadableError:
    """Returns line, column and reason, and the line itself with a caret below it."""
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    if "'\\t'" in (error.problem or ""):
        reason = "tab character; YAML wants spaces"
    elif "single document" in (error.context or ""):
        reason = "a second document; keep one"
    else:
        reason = f"not valid YAML: {error.problem or error.context}"
    return UnreadableError(f"{reason}\n{mark.get_snippet()}", mark.line + 1, mark.column + 1)


class _Converter:
    """Turns nodes into values; keys that cannot be keys become problems."""

    def __init__(self, file: Origin, problems: list[Problem]) -> None:
        self._file = file
        self._problems = problems
        # An alias (*name) is the same node as its anchor: converted once, a file whose aliases
        # double forty times costs forty values, not 2**40.
        self._converted: dict[int, Value] = {}

    def convert_mapping(self, node: yaml.MappingNode) -> Group:
        """Returns the entries of a mapping, each with the line of its key."""
        entries = []
        for key, value in node.value:
            origin = replace(self._file, line=key.start_mark.line + 1)
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                self._problems.append(Problem(origin, "expected a name before the colon"))
            elif key.value == "<<":
                text = "merge keys (<<) are not allowed. Write the options out"
                self._problems.append(Problem(origin, text))
            elif not value.tag.startswith(_STANDARD_TAG) or "python/" in value.tag:
                tag = value.tag.replace(_STANDARD_TAG, "!!")
                self._problems.append(Problem(origin, f"tags are not allowed, got {tag}"))
            else:
                entries.append(Entry(key.value, self._convert(value), origin))
        return Group(tuple(entries))

    def _convert(self, node: yaml.Node) -> Value:
        known = self._converted.get(id(node))
        if known is None:
            known = self._converted[id(node)] = self._convert_new(node)
        return known

    def _convert_new(self, node: yaml.Node) -> Value:
        if isinstance(node, yaml.MappingNode):
            return self.convert_mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return Items(tuple(self._convert(child) for child in node.value))
        assert isinstance(node, yaml.ScalarNode)
        return Scalar(node.value, quoted=node.style is not None)
