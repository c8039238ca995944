"""Reads the files that a command line names, and the command line itself, into layers."""

from __future__ import annotations

import os
from collections.abc import Sequence

from settings.command_line import COMMAND_LINE, Arguments
from settings.foreign import fivezeroes_bdh, tmrc
from settings.foreign.preset_file import read_preset
from settings.foreign.translate import translate
from settings.merge import Layer, read_layer
from settings.names import is_section
from settings.schema import Schema
from settings.values import Scalar
from settings.yaml_reader import Entry, Group, read_file


def read_layers(schema: Schema, arguments: Arguments, default: str) -> list[Layer]:
    """Returns a layer for each file, in order, and the command line's last; without a file named,
    `default` is read. Configs of other trainers come back in our names and units."""
    other = f"{default.removesuffix('.yaml')}.yml"
    missing = not os.path.exists(default) and os.path.exists(other)
    names = arguments.files or [other if missing else default]
    layers = [read_source(schema, number, name) for number, name in enumerate(names, start=1)]
    entries, problems = arguments.entries(len(names) + 1)
    last = read_layer(schema, len(names) + 1, COMMAND_LINE, entries)
    last.problems += problems
    last.style = "command line"
    layers.append(last)
    # A flat file may be nanoGPT's although its names are ours too (`bias: false`). Without a file,
    # names on the command line may choose one.
    flat = any(layer.style in ("flat", "preset") for layer in layers)
    if arguments.files and not flat and all(layer.native for layer in layers):
        return layers
    return translate(schema, layers, arguments, read_source)


def read_source(schema: Schema, number: int, name: str) -> Layer:
    """Returns the layer of one file."""
    if name.endswith(".py"):
        entries, problems, notes = read_preset(name, number)
        layer = read_layer(schema, number, name, entries)
        layer.style = "preset"
        layer.notes += notes
    else:
        entries, problems = read_file(name, number)
        layer = _read_yaml(schema, number, name, entries)
    layer.problems += problems
    layer.incomplete = bool(problems)
    return layer


def _read_yaml(schema: Schema, number: int, name: str, entries: Sequence[Entry]) -> Layer:
    layer = read_layer(schema, number, name, entries)
    if not any(_stands_for_section(schema, entry) for entry in entries):
        layer.style = "flat"
    elif not layer.native and tmrc.recognises(entries):
        layer = tmrc.read(schema, number, name, entries)
    elif not layer.native and fivezeroes_bdh.recognises(entries):
        layer = fivezeroes_bdh.read(schema, number, name, entries)
    return layer


def _stands_for_section(schema: Schema, entry: Entry) -> bool:
    empty = isinstance(entry.value, Scalar) and entry.value.is_null
    return isinstance(entry.value, Group) or (empty and is_section(schema, entry.key))
