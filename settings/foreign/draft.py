"""The entries of a foreign file while they become ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from settings.layers import read_value
from settings.problems import Origin, Problem
from settings.reader import Entry, Group, Plain
from settings.schema import Option, Schema, foreign_option
from settings.values import RefusedError, to_text


class Unsupported(NamedTuple):
    """A problem of a file that is none where a later layer gives one of `remedies`."""

    problem: Problem
    remedies: tuple[str, ...]


class Draft:
    """Entries by 'section.option', to be taken, replaced and added, with notes and problems."""

    def __init__(self, schema: Schema, entries: Sequence[Entry]) -> None:
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.unsupported: list[Unsupported] = []
        self._schema = schema
        self._entries = entries
        self._sections = [
            (entry.key, list(entry.value.entries))
            for entry in entries
            if isinstance(entry.value, Group)
        ]
        self._added: list[Entry] = []
        self._places: dict[str, Origin] = {}  # of what was removed
        first = entries[0].origin if entries else Origin()
        self._origin = Origin(first.layer, source=first.source)  # of what no line says

    def entries(self) -> list[Entry]:
        """Returns what is left of the file and what was added; no section that became empty."""
        groups = iter(self._sections)
        found = []
        for entry in self._entries:
            if not isinstance(entry.value, Group):
                found.append(entry)
                continue
            _, children = next(groups)
            if children or not entry.value.entries:
                found.append(Entry(entry.key, Group(tuple(children)), entry.origin))
        return found + self._added

    def has(self, key: str) -> bool:
        """Returns whether the file gives 'section.option'."""
        return self._find(key) is not None

    def has_section(self, name: str) -> bool:
        """Returns whether the file has a section of this name."""
        return any(section == name for section, _ in self._sections)

    def peek(self, key: str) -> Any:
        """Returns the value of one of our options: the default where it is not given.

        A value that cannot be read is None here, and left for the merge to complain of.
        """
        option, entry = self._schema.options[key], self._find(key)
        try:
            return read_value(option, entry.value) if entry else option.default
        except RefusedError:
            return None

    def take(self, key: str, takes: Any, default: Any = None) -> Any:
        """Removes an option of theirs and returns its value, `takes` being its type."""
        entry = self._find(key)
        if entry is None:
            return default
        self._remove(key, entry)
        option: Option = foreign_option(key, takes, default)
        try:
            return read_value(option, entry.value)
        except RefusedError as error:
            self.problems.append(Problem(entry.origin, f"{key}: {error}"))
            return default

    def put(self, key: str, value: Any, like: str = "") -> None:
        """Gives one of our options a value, in place of the file's; `like`: at that key's line."""
        old = self._find(key)
        if old is not None:
            self._remove(key, old)
        self._added.append(Entry(key, Plain(value), self._place(key if old else like)))

    def fill(self, values: Mapping[str, Any], why: str) -> None:
        """Gives options that the file leaves out what its trainer does, and says so."""
        missing = {key: value for key, value in values.items() if not self.has(key)}
        for key, value in missing.items():
            self.put(key, value)
        if missing:
            self.notes.append(f"{assignments(missing)}: {why}")

    def ignore(self, keys: Iterable[str], why: str) -> None:
        """Removes options that have no meaning here, in one line for all of them."""
        left = (key for key in keys if key not in self._places)  # else given twice
        found = {key: entry for key in left if (entry := self._find(key)) is not None}
        for key, entry in found.items():
            self._remove(key, entry)
        if found:
            self.notes.append(f"{', '.join(found)}: ignored, {why}")

    def refuse(self, key: str, text: str, remedies: Sequence[str]) -> None:
        """Refuses what a key says, unless a later layer gives one of `remedies`."""
        problem = Problem(self._place(key), text)
        self.unsupported.append(Unsupported(problem, tuple(remedies)))

    def refuse_rest(self, section: str, known: Sequence[str], why: str = "") -> None:
        """Refuses what is left of a section of theirs: `why`, or with the name that is meant."""
        for own, children in self._sections:
            for child in children if own == section else ():
                near = difflib.get_close_matches(child.key, known, 1)
                text = f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}"
                text = "given twice. Keep one" if child.key in known else f"unknown option. {text}"
                text = why or text
                self.problems.append(Problem(child.origin, f"{section}.{child.key}: {text}"))
        self._sections = [(own, [] if own == section else kept) for own, kept in self._sections]

    def _find(self, key: str) -> Entry | None:
        section, _, name = key.partition(".")
        for entry in self._added:
            if entry.key == key:
                return entry
        for own, children in self._sections:
            for child in children:
                if own == section and child.key == name:
                    return child
        return None

    def _place(self, key: str) -> Origin:
        """Returns the line that gives or gave a key, else the file."""
        entry = self._find(key)
        return entry.origin if entry else self._places.get(key, self._origin)

    def _remove(self, key: str, entry: Entry) -> None:
        """Removes by identity: of a key given twice one stays, for the merge to complain of."""
        self._places[key] = entry.origin
        self._added = [other for other in self._added if other is not entry]
        self._sections = [
            (section, [child for child in children if child is not entry])
            for section, children in self._sections
        ]


def assignments(values: Mapping[str, Any]) -> str:
    """Returns 'a=1, b=false' for a note."""
    return ", ".join(f"{key}={to_text(value)}" for key, value in values.items())
