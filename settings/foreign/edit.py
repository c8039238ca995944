"""Steps that the dialects share: what a layer of another trainer gives becomes ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from settings.errors import Origin, Problem
from settings.merge import Layer, Unsupported, assignments
from settings.yaml_reader import Entry, Group


def written_names(entries: Sequence[Entry]) -> set[str]:
    """Returns 'section.name' for each entry in a section, as written."""
    groups = [(entry.key, entry.value) for entry in entries if isinstance(entry.value, Group)]
    return {f"{name}.{child.key}" for name, group in groups for child in group.entries}


def take(layer: Layer, key: str, default: Any = None) -> Any:
    """Removes an option of theirs and returns its value."""
    given = layer.given.pop(key, None)
    return default if given is None else given.value


def origin_of(layer: Layer, key: str) -> Origin:
    """Returns the line that gives an option, or the file."""
    given = layer.given.get(key)
    return given.origin if given else Origin(layer.number, source=layer.source)


def fill(layer: Layer, values: Mapping[str, Any], why: str) -> None:
    """Gives the options that a file leaves out the values that its trainer uses, with a note."""
    missing = {key: value for key, value in values.items() if key not in layer.given}
    for key, value in missing.items():
        layer.put(key, value)
    if missing:
        layer.note(f"{assignments(missing)}: {why}")


def ignore(layer: Layer, keys: Iterable[str], why: str) -> None:
    """Removes options that have no meaning here, with one note for all of them."""
    found = [key for key in keys if key in layer.given]
    for key in found:
        del layer.given[key]
    if found:
        layer.note(f"{', '.join(found)}: ignored, {why}")


def refuse(layer: Layer, origin: Origin, text: str, remedies: Sequence[str]) -> None:
    """Adds a problem unless a later layer gives one of the `remedies`."""
    layer.unsupported.append(Unsupported(Problem(origin, text), tuple(remedies)))
