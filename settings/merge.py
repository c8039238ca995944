"""Reads the entries of files and of the command line, and merges them to one value per option.

A later layer wins over an earlier one. Within a file no option may be given twice. Every problem is
collected with its place, so that one run reports all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from settings.entries import change_entry, describe, read_list, read_value
from settings.errors import Origin, Problem
from settings.names import (
    IGNORED,
    SECTION_ALIASES,
    TARGETS,
    UNSUPPORTED,
    WORDS,
    Target,
    is_section,
    refuse_unknown_section,
    resolve,
)
from settings.schema import Option, Schema
from settings.values import RefusedError, Scalar, shown, to_text
from settings.yaml_reader import Entry, Group, Items, PythonValue, Value


@dataclass(frozen=True, slots=True)
class Given:
    """The value of one option as one layer gives it."""

    value: Any
    origin: Origin
    name: str  # as written: 'lr', 'training.lr'


class Unsupported(NamedTuple):
    """A problem unless a later layer gives one of the options that are its remedies."""

    problem: Problem
    remedies: tuple[str, ...]


@dataclass(slots=True)
class Layer:
    """What one file or the command line gives, by option."""

    number: int  # counts up from 0, which is a base below the files; a later layer wins
    source: str  # a file's name or 'command line'
    style: Literal["sections", "flat", "preset", "command line"] = "sections"
    given: dict[str, Given] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the user
    refused: set[str] = field(default_factory=set)  # options given with a value that is not taken
    unsupported: list[Unsupported] = field(default_factory=list)
    changes: list[tuple[Option, Entry]] = field(default_factory=list)  # of one entry of a list
    incomplete: bool = False  # a part of the file could not be read
    native: bool = True  # every name is the own name of one of our options

    def put(self, key: str, value: Any, origin: Origin | None = None) -> None:
        """Gives an option a value; without `origin`, at its own line or else that of the file."""
        if origin is None:
            own = self.given.get(key)
            origin = own.origin if own else Origin(self.number, source=self.source)
        self.given[key] = Given(value, origin, key)

    def note(self, text: str) -> None:
        """Keeps a line for the user, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(slots=True)
class Merged:
    """The values of all layers together."""

    given: dict[str, Given] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # of layer 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    incomplete: bool = False

    @property
    def origins(self) -> dict[str, Origin]:
        """Where each option that is given was given."""
        return {key: given.origin for key, given in self.given.items()}

    def layer(self, key: str) -> int:
        """Returns the number of the layer that gives an option; 0 also if none does."""
        return self.given[key].origin.layer if key in self.given else 0

    def replace(self, key: str, value: Any, origin: Origin, why: str) -> None:
        """Gives an option another value and tells the user."""
        self.given[key] = Given(value, origin, key)
        self.note(why)

    def change(self, option: Option, change: Entry) -> None:
        """Changes one option of one entry of a list that an earlier layer gives."""
        entries = self.given[option.key].value if option.key in self.given else option.default
        try:
            value = change_entry(option, entries, change)
            self.given[option.key] = Given(value, change.origin, option.key)
        except RefusedError as error:
            self.refused.add(option.key)
            self.problems.append(Problem(change.origin, f"{change.key}: {error}"))

    def note(self, text: str) -> None:
        """Keeps a line for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def by_section(self) -> dict[str, dict[str, Any]]:
        """Returns the values given for each section, by the options' bare names."""
        found = defaultdict[str, dict[str, Any]](dict)
        for key, given in self.given.items():
            section, _, name = key.partition(".")
            found[section][name] = given.value
        return found


def merge(layers: Sequence[Layer]) -> Merged:
    """Returns the last value given for each option, with all problems and notes."""
    merged = Merged()
    for layer in layers:
        merged.given |= layer.given  # a later layer wins
        merged.problems += layer.problems
        for option, change in layer.changes:
            merged.change(option, change)
        merged.refused |= layer.refused
        merged.incomplete |= layer.incomplete
        merged.notes += [note for note in layer.notes if note not in merged.notes]
        if layer.number == 0:
            merged.defaults = {key: given.value for key, given in layer.given.items()}
    return merged


def read_layer(schema: Schema, number: int, source: str, entries: Iterable[Entry]) -> Layer:
    """Returns a layer whose values are read by the types of their options."""
    reader = _LayerReader(schema, Layer(number, source))
    for entry in entries:
        reader.add(entry)
    return reader.layer


class _LayerReader:
    """Resolves names and reads values; a mistake becomes a problem of the layer."""

    def __init__(self, schema: Schema, layer: Layer) -> None:
        self.layer = layer
        self._schema = schema
        self._sections: dict[str, Entry] = {}  # seen so far
        self._options: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Adds a top-level entry: a section, or an option by its name."""
        try:
            if isinstance(entry.value, Group):
                self._add_section(entry, entry.value)
            elif not self._should_be_section(entry):
                self._add_option(entry)
            elif isinstance(entry.value, Scalar) and entry.value.is_null:
                self._refuse_second_section(entry)
            else:
                raise RefusedError(
                    f"{entry.key}: expected a section ('option: value' lines below it), "
                    f"got {describe(entry.value)}"
                )
        except RefusedError as error:
            self._add_problem(entry, str(error))

    def _add_section(self, entry: Entry, group: Group) -> None:
        if entry.key in IGNORED:
            self.layer.note(f"{entry.key} is ignored: {IGNORED[entry.key]}")
            return
        refuse_unknown_section(self._schema, entry.key)
        self._refuse_second_section(entry)
        for child in group.entries:
            try:
                self._add_option(Entry(f"{entry.key}.{child.key}", child.value, child.origin))
            except RefusedError as error:
                self._add_problem(child, str(error))

    def _add_option(self, entry: Entry) -> None:
        listed = self._schema.list_of(entry.key)
        if listed is not None:
            self.layer.changes.append((listed, entry))
            return
        target = resolve(self._schema, entry.key)
        # Only names of other trainers send a layer through settings.foreign.
        own_name = not target.is_alias and target.keys and target.keys[0] in self._schema.options
        self.layer.native &= bool(own_name)
        if target.ignored:
            self.layer.note(f"{entry.key} is ignored: {target.ignored}")
            return
        if target.is_alias and not self._schema.extra.keys() & set(target.keys):
            self.layer.note(f"{entry.key} is read as {' and '.join(target.keys)}")
        for key, value in zip(target.keys, _split_list(target, entry), strict=True):
            part = Entry(entry.key, value, entry.origin)
            if key in UNSUPPORTED:
                self._check_unsupported(key, part)
            else:
                self._add_value(key, part)

    def _add_value(self, key: str, entry: Entry) -> None:
        option = self._schema.find(key)
        assert option is not None
        try:
            if option.entry_options:
                value, problems = read_list(option, entry)
                self.layer.problems += problems
                self.layer.refused |= {key} if problems else set()
            else:
                value = read_value(option, self._replace_word(option, entry.value))
        except RefusedError as error:
            self.layer.refused.add(key)
            known = (key, key.split(".")[1])
            name = key if entry.key in known else f"{key} (given as {entry.key})"
            raise RefusedError(f"{name}: {error}") from None
        # By option, not by name: `lr` and `training.learning_rate` are one option given twice.
        first = self._options.setdefault(key, entry)
        if first is not entry:
            self._add_second_value(key, first, entry, value)
        self.layer.given[key] = Given(value, entry.origin, entry.key)

    def _add_second_value(self, key: str, first: Entry, entry: Entry, value: Any) -> None:
        """A second value is a mistake in a file; on a command line the last one is taken."""
        both = "" if first.key == entry.key else f" as {first.key} and as {entry.key}"
        before = self.layer.given[key].value
        if entry.origin.line:
            raise RefusedError(
                f"{key}: given twice{both} (first at line {first.origin.line}). Keep one"
            )
        if value != before:
            values = f"{shown(before)} and {shown(value)}"
            self.layer.note(f"{key}: given twice{both}: {values}. The last one is taken")

    def _replace_word(self, option: Option, value: Value) -> Value:
        """Returns our word for a value where people type another one ('gpu'), and says so."""
        any_text = option.kind is str and option.form is None
        if not isinstance(value, Scalar) or (value.quoted and any_text):
            return value  # a path that is called "false" is written in quotes
        ours = WORDS.get(option.key, {}).get(value.text.lower())
        if ours is None:
            return value
        self.layer.note(f"{option.key}={value.text} is read as {option.key}={ours}")
        return Scalar(ours, shell=value.shell)

    def _check_unsupported(self, key: str, entry: Entry) -> None:
        """Refuses an option that this version lacks, unless its value asks for nothing."""
        value = entry.value.value if isinstance(entry.value, PythonValue) else entry.value
        text = (value.text if isinstance(value, Scalar) else str(value)).lower()
        if text not in UNSUPPORTED[key]:
            remedy = f"Set it to {UNSUPPORTED[key][0]}"
            raise RefusedError(f"{key}: not available in this version. {remedy}")
        self.layer.note(f"{key}={text} changes nothing in this version")

    def _should_be_section(self, entry: Entry) -> bool:
        """Returns whether an entry without a mapping names a section."""
        # `training=8` in a shell is an override with a wrong key, not a section without a body.
        from_shell = isinstance(entry.value, Scalar) and entry.value.shell
        empty = isinstance(entry.value, Scalar) and entry.value.is_null
        names_option = entry.key in TARGETS and not empty  # 'dataset: openwebtext'
        return not from_shell and not names_option and is_section(self._schema, entry.key)

    def _refuse_second_section(self, entry: Entry) -> None:
        section = SECTION_ALIASES.get(entry.key, entry.key)
        first = self._sections.setdefault(section, entry)
        if first is not entry:
            name = "" if first.key == entry.key else f" as {first.key}"
            text = f"section {entry.key} appears twice (first{name} at line {first.origin.line})"
            self._add_problem(entry, f"{text}. Join them")

    def _add_problem(self, entry: Entry, text: str) -> None:
        self.layer.native = False
        self.layer.problems.append(Problem(entry.origin, text))


def assignments(values: Mapping[str, Any]) -> str:
    """Returns 'a=1, b=false' for a message."""
    return ", ".join(f"{key}={to_text(value)}" for key, value in values.items())


def _split_list(target: Target, entry: Entry) -> tuple[Value, ...]:
    """Returns one value for each option of the target: a list if the name stands for several."""
    if len(target.keys) == 1:
        return (entry.value,)
    value = entry.value
    if isinstance(value, Scalar) and value.shell:
        texts = value.text.strip("[]() ").split(",")
        value = Items(tuple(Scalar(text.strip(), shell=True) for text in texts))
    if not isinstance(value, Items) or len(value.values) != len(target.keys):
        raise RefusedError(
            f"{entry.key}: expected a list of {len(target.keys)} numbers "
            f"({', '.join(target.keys)}), got {describe(value)}"
        )
    return value.values
