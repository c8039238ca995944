"""Reads a value as it was written: a single one, or a list whose entries have options of their own.

The entries of a list are known by their name, so that an override can change one option of one of
them: `mixture.web.weight=0.5`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from settings.errors import Origin, Problem
from settings.names import nearest
from settings.schema import REQUIRED, Option
from settings.values import RefusedError, Scalar, check_value, expected, read_scalar, shown
from settings.yaml_reader import Entry, Group, Items, PythonValue, Value


def entries_of(values: Mapping[Any, Any], origin: Origin) -> list[Entry]:
    """Returns entries for nested Python values, such as the config in a checkpoint."""
    return [Entry(str(key), _value_of(value, origin), origin) for key, value in values.items()]


def _value_of(value: Any, origin: Origin) -> Value:
    if isinstance(value, Mapping):
        return Group(tuple(entries_of(value, origin)))
    if isinstance(value, (list, tuple)):
        return Items(tuple(_value_of(each, origin) for each in value))
    return PythonValue(value)


def flat_options(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config's plain values by 'section.name', those of an entry of a list by
    'section.list.entry.name'."""
    flat = dict[str, Any]()
    for section, options in sections.items():
        for name, value in options.items() if isinstance(options, Mapping) else ():
            key = f"{section}.{name}"
            if not isinstance(value, list):
                flat[key] = value
                continue
            for entry in filter(lambda each: isinstance(each, Mapping), value):
                own = f"{key}.{entry.get('name')}"
                flat |= {f"{own}.{each}": entry[each] for each in entry if each != "name"}
    return flat


def nested_options(flat: Mapping[str, Any], lists: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the sections that `flat_options` made flat; keys without a section are left out.

    lists: the options whose values are lists, such as `dataset.mixture`.
    """
    sections = dict[str, dict[str, Any]]()
    entries = dict[tuple[str, str], dict[str, Any]]()
    for key, value in flat.items():
        of = next((each for each in lists if key.startswith(f"{each}.")), None)
        section, _, name = key.partition(".")
        if of is not None:
            entry, _, own = key.removeprefix(f"{of}.").rpartition(".")
            entries.setdefault((of, entry), {"name": entry})[own] = value
        elif name:
            sections.setdefault(section, {})[name] = value
    for (of, _), entry_values in entries.items():
        section, _, name = of.partition(".")
        sections.setdefault(section, {}).setdefault(name, []).append(entry_values)
    return sections


def read_value(option: Option, value: Value) -> Any:
    """Returns what a value as written means for an option; raises RefusedError."""
    if isinstance(value, Scalar):
        return read_scalar(option, value)
    if isinstance(value, PythonValue):
        return check_value(option, value.value)
    raise RefusedError(f"expected {expected(option)}, got {describe(value)}")


def describe(value: Value) -> str:
    """Returns a value for a message, a list or a section in words."""
    if isinstance(value, Items):
        return f"a list of {len(value.values)}"
    if isinstance(value, Group):
        return "a section"
    return shown(value.text if isinstance(value, Scalar) else value.value)


def read_list(option: Option, given: Entry) -> tuple[tuple[Any, ...], list[Problem]]:
    """Returns the entries of a list and what is wrong in them, each at its line; raises
    RefusedError for what is no list of `key: value` pairs."""
    if isinstance(given.value, Scalar) and given.value.text in ("[]", "null"):
        return (), []
    if not isinstance(given.value, Items):
        raise RefusedError(f"expected {expected(option)}, got {describe(given.value)}")
    assert option.kind is not None
    made, problems = list[Any](), list[Problem]()
    for number, item in enumerate(given.value.values, start=1):
        if not isinstance(item, Group):
            raise RefusedError(f"entry {number}: expected key: value pairs, got {describe(item)}")
        values, wrong = read_options(option.entry_options, item, given.origin)
        if values.get("name") in [each.name for each in made]:
            at = next(child.origin for child in item.entries if child.key == "name")
            text = f"{option.key}: two entries have the name {values['name']}"
            problems.append(Problem(at, text))
        problems += [Problem(at, f"{option.key}: entry {number}: {text}") for at, text in wrong]
        made += [] if wrong else [option.kind(**values)]
    return tuple(made), problems


def read_options(
    known: Sequence[Option], item: Group, origin: Origin
) -> tuple[dict[str, Any], list[tuple[Origin, str]]]:
    """Returns the values of `key: value` pairs, and what is wrong with them. origin: of what they
    belong to."""
    first, values, wrong = dict[str, Entry](), dict[str, Any](), list[tuple[Origin, str]]()
    for child in item.entries:
        try:
            own = find_option(known, child.key)
            if first.setdefault(child.key, child) is not child:
                line = first[child.key].origin.line
                raise RefusedError(f"given twice (first at line {line}). Keep one")
            values[child.key] = read_value(own, child.value)
        except RefusedError as error:
            wrong.append((child.origin, f"{child.key}: {error}"))
    at = item.entries[0].origin if item.entries else origin
    for own in known:
        if own.default is REQUIRED and own.name not in first:
            wrong.append((at, f"{own.name} is missing ({own.doc})"))
    return values, wrong


def find_option(known: Sequence[Option], name: str) -> Option:
    """Returns the option of that name; RefusedError with the nearest known name."""
    names = {own.name: own for own in known}
    if name not in names:
        near = nearest(name, {own: own for own in names}) or f"Keys: {', '.join(names)}"
        raise RefusedError(f"unknown key. {near}")
    return names[name]


def change_entry(option: Option, entries: Iterable[Any], change: Entry) -> tuple[Any, ...]:
    """Returns the entries with one option of one of them changed, as `mixture.web.weight` names it;
    raises RefusedError."""
    name, _, key = change.key.removeprefix(f"{option.section}.").partition(".")[2].rpartition(".")
    if not name:
        raise RefusedError(f"give a key of it: {option.name}.{key}.weight=...")
    value = read_value(find_option(option.entry_options, key), change.value)
    entries = tuple(entries)
    # A shell's option may be written with dashes or underscores alike.
    chosen = [each for each in entries if _shell_name(each.name) == _shell_name(name)]
    if len(chosen) != 1:
        count, known = len(chosen) or "no", ", ".join(each.name for each in entries) or "none"
        raise RefusedError(f"{count} entries are named {shown(name)}. Entries: {known}")
    return tuple(replace(each, **{key: value}) if each in chosen else each for each in entries)


def _shell_name(name: str) -> str:
    return name.replace("-", "_")
