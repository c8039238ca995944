"""Read a YAML file into entries that remember their lines, building no Python objects.

PyYAML's node graph gives every key and value a line and the raw text of every scalar; what a scalar
means is decided later, by the type of its option. Tags are refused, so nothing is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from files.regular import open_regular
from settings.problems import Origin, Problem
from settings.values import Scalar, one_line

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # keys and values, aliases expanded
MAX_DEPTH = 50


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` as written, in a file, on the command line or in a checkpoint."""

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
class Plain:
    """A Python value, from a checkpoint."""

    value: Any


Value: TypeAlias = "Scalar | Items | Group | Plain"


class UnreadableError(Exception):
    """A file that cannot be read as entries at all."""

    def __init__(self, text: str, line: int = 0, column: int = 0) -> None:
        super().__init__(text)
        self.line = line
        self.column = column


def read_file(path: str | os.PathLike[str], layer: int) -> tuple[list[Entry], list[Problem]]:
    """Return the top-level entries of a YAML file and what is wrong with its form."""
    origin = Origin(layer, source=os.fspath(path))
    try:
        node, problems = _compose(read_text(origin.source), origin)
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
            return [], problems
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise UnreadableError(f"expected sections (model:, training:, ...), found {kind}")
        group = _Converter(origin, problems).group(node)
    except UnreadableError as error:
        place = replace(origin, line=error.line, column=error.column)
        return [], [Problem(place, str(error))]
    return list(group.entries), problems


def read_text(name: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file of limited size; raises UnreadableError."""
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
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        message = f"byte 0x{byte:02x} at offset {error.start} is not UTF-8. Save the file as UTF-8"
        raise UnreadableError(message, line) from None
    if "\0" in text:
        offset = text.index("\0")
        raise UnreadableError(f"NUL byte at offset {offset}", text.count("\n", 0, offset) + 1)
    return text


class _Loader(yaml.SafeLoader):
    """Compose a node graph of limited size and depth, noting every tag."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: list[tuple[int, str]] = []
        self._count = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        self._count += 1
        self._depth += 1
        if self._count > MAX_VALUES:
            raise UnreadableError(f"refused: more than {MAX_VALUES} keys and values", line)
        if self._depth > MAX_DEPTH:
            raise UnreadableError(f"nested more than {MAX_DEPTH} levels deep", line)
        if getattr(event, "tag", None) is not None:
            self.tags.append((line, event.tag.replace("tag:yaml.org,2002:", "!!")))
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _compose(text: str, origin: Origin) -> tuple[yaml.Node | None, list[Problem]]:
    """Return the root node, or None for an empty file, and the tags as problems."""
    try:
        loader = _Loader(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
        finally:
            loader.dispose()
        if node is not None:
            _count_values(node, {})
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(text[error.position])
        raise UnreadableError(f"the character U+{code:04X} is not allowed in YAML", line) from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UnreadableError(f"not valid YAML: {one_line(str(error))}") from None
    return node, [
        Problem(replace(origin, line=line), f"tags are not allowed, got {tag}")
        for line, tag in loader.tags
    ]


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> UnreadableError:
    """Return line, column, reason and the line itself with a caret below it."""
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    lines = text.splitlines()
    shown = lines[mark.line] if mark.line < len(lines) else ""
    indent = shown[: len(shown) - len(shown.lstrip())]
    if "\t" in indent or shown[mark.column : mark.column + 1] == "\t":
        reason = "tab character; YAML wants spaces"
    elif "single document" in (error.context or ""):
        reason = "a second document; keep one"
    else:
        reason = f"not valid YAML: {error.problem or error.context}"
    start = max(0, mark.column - 60)
    snippet = shown[start : start + 80].replace("\t", " ")
    caret = " " * (mark.column - start) + "^"
    return UnreadableError(f"{reason}\n    {snippet}\n    {caret}", mark.line + 1, mark.column + 1)


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes `node` stands for with its aliases expanded; refuse too many."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise UnreadableError("an alias (*) contains itself", node.start_mark.line + 1)
        return known[id(node)]
    known[id(node)] = 0  # under way
    total = 1 + sum(_count_values(child, known) for child in _children(node))
    if total > MAX_VALUES:
        line = node.start_mark.line + 1
        raise UnreadableError(f"refused: aliases (*) expand beyond {MAX_VALUES} values", line)
    known[id(node)] = total
    return total


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


class _Converter:
    """Turns nodes into values; keys that cannot be keys become problems."""

    def __init__(self, file: Origin, problems: list[Problem]) -> None:
        self._file = file
        self._problems = problems

    def group(self, node: yaml.MappingNode) -> Group:
        entries = []
        for key, value in node.value:
            origin = replace(self._file, line=key.start_mark.line + 1)
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                self._problems.append(Problem(origin, "expected a name before the colon"))
            elif key.value == "<<":
                text = "merge keys (<<) are not allowed. Write the options out"
                self._problems.append(Problem(origin, text))
            else:
                entries.append(Entry(key.value, self._value(value), origin))
        return Group(tuple(entries))

    def _value(self, node: yaml.Node) -> Value:
        if isinstance(node, yaml.MappingNode):
            return self.group(node)
        if isinstance(node, yaml.SequenceNode):
            return Items(tuple(self._value(child) for child in node.value))
        assert isinstance(node, yaml.ScalarNode)
        return Scalar(node.value, quoted=node.style is not None)
