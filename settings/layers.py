"""Put layers of entries (files, then the command line) together into one value per option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from settings import dialects
from settings.dialects import IGNORED, SECTIONS, TARGETS
from settings.names import Target, check_section, is_section, resolve
from settings.problems import Origin, Problem
from settings.reader import Entry, Group, Items, Plain, Value
from settings.schema import Option, Schema
from settings.values import (
    FALSE_WORDS,
    NULL_WORDS,
    TRUE_WORDS,
    RefusedError,
    Scalar,
    check_value,
    expected,
    read_scalar,
    shown,
    to_text,
)


@dataclass(slots=True)
class Merged:
    """The values given, by key; where each came from; what is wrong; what to tell the user."""

    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # of the base, where there is one
    origins: dict[str, Origin] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)  # key -> the name it was given under
    problems: list[Problem] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # keys given with a value that is not taken
    notes: list[str] = field(default_factory=list)
    nanogpt: frozenset[int] = frozenset()  # layers whose names mean what nanoGPT means by them

    def owns(self, key: str) -> bool:
        """Return whether the value of `key` is one of the base, below all layers."""
        return key in self.origins and self.origins[key].layer == 0

    def layer(self, key: str) -> int:
        """Return the layer that gave `key`; 0 for none."""
        return self.origins[key].layer if key in self.origins else 0

    def put(self, key: str, value: Any, origin: Origin) -> None:
        """Set a value that follows from one given at `origin`."""
        self.values[key] = value
        self.origins[key] = origin

    def drop(self, key: str) -> None:
        """Take a value back, as if it had not been given."""
        self.values.pop(key, None)
        self.origins.pop(key, None)

    def note(self, text: str) -> None:
        """Keep a line for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def stand_on(self, base: Merged) -> None:
        """Take from `base`, which was read as layer 0, what no layer gave."""
        self.defaults = dict(base.values)
        for key, value in base.values.items():
            if key not in self.values:
                self.put(key, value, base.origins[key])
        self.problems += base.problems

    def section(self, name: str) -> dict[str, Any]:
        """Return the values of one section by option name."""
        values = ((key.split(".", 1), value) for key, value in self.values.items())
        return {option: value for (section, option), value in values if section == name}


def merge(schema: Schema, layers: Iterable[Iterable[Entry]]) -> Merged:
    """Return the last value given for each option, each read by its option's type."""
    merged = Merged()
    for layer in layers:
        _Layer(schema, merged).add(layer)
    return merged


class _Layer:
    """One layer while it is merged: no option may be given twice, but on the command line."""

    def __init__(self, schema: Schema, merged: Merged) -> None:
        self._schema = schema
        self._merged = merged
        self._sections: dict[str, Entry] = {}
        self._given: dict[str, tuple[Entry, Any]] = {}  # key -> entry, value

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            try:
                self._add_top(entry)
            except RefusedError as error:
                self._problem(entry, str(error))

    def _problem(self, entry: Entry, text: str) -> None:
        self._merged.problems.append(Problem(entry.origin, text))

    def _add_top(self, entry: Entry) -> None:
        value = entry.value
        if isinstance(value, Group):
            self._add_section(entry, value)
        elif not self._stands_for_section(entry):
            self._add_option(entry)
        elif isinstance(value, Scalar) and value.is_null:
            self._first_time(entry)
        else:
            raise RefusedError(
                f"{entry.key}: expected a section ('option: value' lines below it), "
                f"got {_kind(value)}"
            )

    def _stands_for_section(self, entry: Entry) -> bool:
        """Return whether an entry without a mapping is a section all the same."""
        in_file = not (isinstance(entry.value, Scalar) and entry.value.shell)
        empty = isinstance(entry.value, Scalar) and entry.value.is_null
        is_option = entry.key in TARGETS and not empty  # 'dataset: name'
        return in_file and is_section(self._schema, entry.key) and not is_option

    def _add_section(self, entry: Entry, group: Group) -> None:
        if entry.key in IGNORED:
            self._merged.note(f"{entry.key} is ignored: {IGNORED[entry.key]}")
            return
        check_section(self._schema, entry.key)
        self._first_time(entry)
        for child in group.entries:
            try:
                self._add_option(Entry(f"{entry.key}.{child.key}", child.value, child.origin))
            except RefusedError as error:
                self._problem(child, str(error))

    def _first_time(self, entry: Entry) -> None:
        section = SECTIONS.get(entry.key, entry.key)
        first = self._sections.setdefault(section, entry)
        if first is not entry:
            name = "" if first.key == entry.key else f" as {first.key}"
            text = f"section {entry.key} appears twice (first{name} at line {first.origin.line})"
            self._problem(entry, f"{text}. Join them")

    def _add_option(self, entry: Entry) -> None:
        target = resolve(self._schema, entry.key)
        if target.ignored:
            self._merged.note(f"{entry.key} is ignored: {target.ignored}")
            return
        if target.is_alias and not self._schema.foreign.keys() & set(target.keys):
            self._merged.note(f"{entry.key} is read as {' and '.join(target.keys)}")
        for key, value in zip(target.keys, _spread(target, entry), strict=True):
            self._take(key, Entry(entry.key, value, entry.origin))

    def _take(self, key: str, entry: Entry) -> None:
        """Read one value for one option and keep it, unless the layer gave it before."""
        option = self._schema.find(key)
        entry = self._in_our_words(key, entry)
        try:
            value = (
                read_value(option, entry.value) if option else _read_later(self._schema, key, entry)
            )
        except RefusedError as error:
            self._merged.refused.add(key)
            raise RefusedError(f"{_named(key, entry)}: {error}") from None
        if key in self._given:
            self._check_twice(key, entry, value)
            return
        self._given[key] = (entry, value)
        if option is None:
            self._merged.note(_without_effect(key, value))
            return
        self._merged.put(key, value, entry.origin)
        self._merged.spelled[key] = entry.key

    def _in_our_words(self, key: str, entry: Entry) -> Entry:
        """Return an entry whose value is ours where another word for it is known, and say so."""
        value, option = entry.value, self._schema.find(key)
        any_text = option is not None and option.kind is str and option.form is None
        if not isinstance(value, Scalar) or (value.quoted and any_text):
            return entry  # a path that is called "false" is written in quotes
        ours = dialects.VALUES.get(key, {}).get(value.text.lower())
        if ours is None:
            return entry
        self._merged.note(f"{key}={value.text} is read as {key}={ours}")
        return Entry(entry.key, Scalar(ours, shell=value.shell), entry.origin)

    def _check_twice(self, key: str, entry: Entry, value: Any) -> None:
        first, first_value = self._given[key]
        both = "" if first.key == entry.key else f" as {first.key} and as {entry.key}"
        if entry.origin.line:
            raise RefusedError(
                f"{key}: given twice{both} (first at line {first.origin.line}). Keep one"
            )
        self._given[key] = (entry, value)
        self._merged.put(key, value, entry.origin)
        self._merged.spelled[key] = entry.key
        if value != first_value:
            values = f"{shown(first_value)} and {shown(value)}"
            self._merged.note(f"{key}: given twice{both}: {values}. The last one is taken")


def from_mapping(values: Mapping[Any, Any], origin: Origin) -> list[Entry]:
    """Return entries for nested plain values, such as a checkpoint's config."""
    return [
        Entry(
            str(key),
            Group(tuple(from_mapping(value, origin)))
            if isinstance(value, Mapping)
            else Plain(value),
            origin,
        )
        for key, value in values.items()
    ]


def read_value(option: Option, value: Value) -> Any:
    """Return what a value as written means for an option; raises RefusedError."""
    if isinstance(value, Scalar):
        return read_scalar(option, value)
    if isinstance(value, Plain):
        return check_value(option, value.value)
    raise RefusedError(f"expected {expected(option)}, got {_kind(value)}")


def _spread(target: Target, entry: Entry) -> tuple[Value, ...]:
    """Return one value per key of the target: a list where the name stands for several."""
    if len(target.keys) == 1:
        return (entry.value,)
    value = entry.value
    if isinstance(value, Scalar) and value.shell:
        texts = value.text.strip("[]() ").split(",")
        value = Items(tuple(Scalar(text.strip(), shell=True) for text in texts))
    if not isinstance(value, Items) or len(value.values) != len(target.keys):
        raise RefusedError(
            f"{entry.key}: expected a list of {len(target.keys)} numbers "
            f"({', '.join(target.keys)}), got {_kind(value)}"
        )
    return value.values


def _read_later(schema: Schema, key: str, entry: Entry) -> Any:
    """Return a value that asks for nothing; refuse what an option still to come would do."""
    harmless = schema.later.get(key, ())
    value = entry.value.value if isinstance(entry.value, Plain) else entry.value
    word = (value.text if isinstance(value, Scalar) else to_text(value)).lower()
    for words, name in ((FALSE_WORDS, "false"), (TRUE_WORDS, "true"), (NULL_WORDS, "null")):
        word = name if word in words else word
    if isinstance(value, (Items, Group)) or word not in harmless:
        remedy = "Remove it" if harmless in ((), ("null",)) else f"Set it to {harmless[0]}"
        raise RefusedError(f"not available in this version. {remedy}")
    return word


def _without_effect(key: str, value: Any) -> str:
    """Return the note on an option still to come whose value asks for nothing."""
    text = value if isinstance(value, str) else to_text(value)
    return f"{key}={text} changes nothing in this version"


def _named(key: str, entry: Entry) -> str:
    """Return the option's key, and how it was written where that is something else."""
    return key if entry.key in (key, key.split(".")[1]) else f"{key} (given as {entry.key})"


def _kind(value: Value) -> str:
    if isinstance(value, Scalar):
        return shown(value.text)
    if isinstance(value, Items):
        return f"a list of {len(value.values)}"
    return "a section" if isinstance(value, Group) else shown(value.value)
