"""Which files a command line stands on: those it names or config.yaml, and below them a base.

A base is a file of ours with the defaults of the trainer whose names are used: a preset of nanoGPT
means what it says only on top of nanoGPT's defaults. It is told aloud, and its values yield.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

from settings.foreign import to_native
from settings.foreign.draft import Unsupported
from settings.layers import Merged, merge
from settings.names import is_section
from settings.overrides import Arguments
from settings.presets import read_preset
from settings.problems import Problem
from settings.reader import Entry, Group, read_file
from settings.schema import Schema
from settings.values import Scalar

_PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NANOGPT = os.path.join(_PROJECT, "configs", "nanogpt.yaml")
TOKEN_FILES = os.path.join(_PROJECT, "configs", "cs336-tinystories.yaml")
_ONLY_NANOGPT_HAS = ("dataset", "bias")  # as bare names
_SHAPE = ("n_layer", "n_head", "n_embd")  # of nanoGPT's GPT; here, of any model


class Source(NamedTuple):
    """A file that was read."""

    name: str
    style: Literal["preset", "nanogpt", "flat", "sections"]
    entries: Sequence[Entry]
    problems: Sequence[Problem]
    notes: Sequence[str] = ()
    unsupported: Sequence[Unsupported] = ()


class Reading(NamedTuple):
    """What a command line gives, all layers together."""

    merged: Merged
    files: tuple[str, ...]
    unread: list[Problem]  # where a file could not be read


def read_layers(schema: Schema, arguments: Arguments, default: str) -> Reading:
    """Read the files in order and the overrides last; without a file, `default`."""
    other = f"{default.removesuffix('.yaml')}.yml"
    missing = not os.path.exists(default) and os.path.exists(other)
    names = arguments.files or [other if missing else default]
    sources = [_read(schema, name, number) for number, name in enumerate(names, start=1)]
    base, note = _base_of_files(sources)
    if not arguments.files and not base and _says_nothing(schema, sources[0]):
        base, note = _base_of_overrides(arguments)
        sources = [] if base else [sources[0]._replace(entries=())]  # all of it left out
    sources = [source for source in sources if not _same_file(source.name, base)]
    last = len(names) + 1
    merged = merge(schema, [*(source.entries for source in sources), arguments.entries(last)])
    merged.problems += arguments.problems_at(last)
    merged.problems += [p for source in sources for p in _unresolved(merged, source)]
    if not arguments.files and not base:
        note = _note_on_model(arguments, merged)
    notes = [note] if note else []
    merged.notes[:0] = notes + [text for source in sources for text in source.notes]
    merged.nanogpt = _nanogpt_layers(sources, base, last)
    if base:
        below = _read(schema, _shown(base), 0)
        merged.stand_on(merge(schema, [below.entries]))
        sources = [below, *sources]
    unread = [problem for source in sources for problem in source.problems]
    return Reading(merged, tuple(source.name for source in sources), unread)


def _read(schema: Schema, name: str, layer: int) -> Source:
    if name.endswith(".py"):
        entries, problems, notes = read_preset(name, layer)
        return Source(name, "preset", entries, problems, notes)
    entries, problems = read_file(name, layer)
    if any(_is_section(schema, entry) for entry in entries):
        native = to_native(schema, name, entries)
        problems += native.problems
        return Source(
            name, "sections", native.entries(), problems, native.notes, native.unsupported
        )
    nanogpt = any(entry.key in _ONLY_NANOGPT_HAS for entry in entries)
    return Source(name, "nanogpt" if nanogpt else "flat", entries, problems)


def _unresolved(merged: Merged, source: Source) -> list[Problem]:
    """Return what a file asks for in vain, unless a later layer gives what to take instead."""
    return [
        problem
        for problem, remedies in source.unsupported
        if not any(
            key in merged.origins and merged.origins[key].layer > problem.origin.layer
            for key in remedies
        )
    ]


def _is_section(schema: Schema, entry: Entry) -> bool:
    empty = isinstance(entry.value, Scalar) and entry.value.is_null
    return isinstance(entry.value, Group) or (empty and is_section(schema, entry.key))


def _base_of_files(sources: Sequence[Source]) -> tuple[str, str]:
    """Return the base that the files ask for, and a line for the user; '' for none."""
    styles = {source.style for source in sources}
    if "preset" not in styles and ("nanogpt" not in styles or "sections" in styles):
        return "", ""
    first = next(source for source in sources if source.style in ("preset", "nanogpt"))
    named = any(_same_file(source.name, NANOGPT) for source in sources)
    note = f"{first.name} stands on nanoGPT's own defaults, {_shown(NANOGPT)}"
    return NANOGPT, "" if named else note


def _base_of_overrides(arguments: Arguments) -> tuple[str, str]:
    """Return the base that the names of the overrides ask for, and a line for the user."""
    given = dict(arguments.overrides)
    base, why = "", ""
    if not Scalar(given.get("dataset", "")).is_null:
        base, why = NANOGPT, f"dataset={given['dataset']}"
    elif all(given.get(f"{part}_data_path", "").endswith(".ids") for part in ("train", "val")):
        base, why = TOKEN_FILES, "train_data_path=*.ids"
    choose = "to start from another file: --config FILE"
    return base, f"{why} without a file starts from {_shown(base)}; {choose}" if base else ""


def _note_on_model(arguments: Arguments, merged: Merged) -> str:
    """Return a line for who gives a shape in nanoGPT's names and may expect its model; else ''."""
    shape = [key for key, _ in arguments.overrides if key in _SHAPE]
    if len(shape) < 2 or merged.values.keys() & {"model.name", "training.init_from"}:
        return ""
    return f"{', '.join(shape)} shape a BDH (model.name=bdh, the default); a GPT: model.name=gpt"


def _says_nothing(schema: Schema, default: Source) -> bool:
    """Return whether the default file is missing or holds nothing but defaults."""
    if not os.path.exists(default.name):
        return True
    merged = merge(schema, [default.entries])
    defaults = {key: option.default for key, option in schema.options.items()}
    told = not merged.values.items() <= defaults.items()
    return not (told or merged.notes or merged.problems or default.problems)


def _nanogpt_layers(sources: Sequence[Source], base: str, last: int) -> frozenset[int]:
    """Return the layers whose names mean what nanoGPT means by them."""
    styles = {"preset", "nanogpt"} | ({"flat"} if base == NANOGPT else set())
    layers = {entry.origin.layer for s in sources if s.style in styles for entry in s.entries}
    return frozenset(layers | ({0, last} if base == NANOGPT else set()))


def _same_file(name: str, base: str) -> bool:
    return bool(base) and os.path.exists(name) and os.path.samefile(name, base)


def _shown(path: str) -> str:
    """Return a path as the user would write it."""
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside
