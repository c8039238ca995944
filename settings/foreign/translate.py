"""The door to other trainers: layers in their names and units become ours, and may get a base.

A base is a file of ours with the defaults of the trainer whose names are used. It is layer 0, the
user is told of it, and its values have the lowest priority.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from settings.command_line import Arguments
from settings.foreign import cs336, nanogpt, tmrc
from settings.merge import Layer
from settings.schema import Schema


def translate(
    schema: Schema,
    layers: list[Layer],
    arguments: Arguments,
    read: Callable[[Schema, int, str], Layer],
) -> list[Layer]:
    """Returns the layers in our options and units, on a base if they ask for one.

    arguments: the command line, which `layers` ends with. read: reads a file as a layer.
    """
    for number, layer in enumerate(layers):
        if _has_names_of_tmrc(schema, layer):
            tmrc.translate_names(layer, layers[:number])
    # A file decides on its base before the command line does.
    path, note = _base_of_files(layers)
    if not arguments.files and not path and _gives_nothing(schema, layers[0]):
        path, note = _base_of_overrides(arguments)
        # config.yaml as it comes gives no value: a rule then names the default, not a line of it.
        layers[0].given.clear()
        layers = layers[1:] if path else layers
    if not arguments.files and not path:
        note = nanogpt.note_on_model(arguments, layers)
    base = None
    if path:
        base = read(schema, 0, _as_written(path))
        base.notes.clear()
        layers = [base, *(layer for layer in layers if not _is_file(layer.source, path))]
    if note:
        layers[0].notes.insert(0, note)
    nanogpt.translate(schema, layers, base if path == nanogpt.DEFAULTS else None)
    for number, layer in enumerate(layers):
        later = {key for above in layers[number + 1 :] for key in above.given}
        layer.problems += [p for p, remedies in layer.unsupported if later.isdisjoint(remedies)]
    return layers


def _has_names_of_tmrc(schema: Schema, layer: Layer) -> bool:
    names = {given.name for given in layer.given.values()}
    return not (names.isdisjoint(tmrc.NAMES) and layer.given.keys().isdisjoint(schema.extra))


def _base_of_files(layers: list[Layer]) -> tuple[str, str]:
    """Returns the base that the files ask for, and a note for the user; '' for none."""
    theirs = [layer for layer in layers if nanogpt.has_its_names(layer)]
    preset = any(layer.style == "preset" for layer in theirs)
    if not preset and (not theirs or any(layer.style == "sections" for layer in layers)):
        return "", ""
    if any(_is_file(layer.source, nanogpt.DEFAULTS) for layer in layers):
        return nanogpt.DEFAULTS, ""  # the user names it
    base = _as_written(nanogpt.DEFAULTS)
    return nanogpt.DEFAULTS, f"{theirs[0].source} stands on nanoGPT's own defaults, {base}"


def _base_of_overrides(arguments: Arguments) -> tuple[str, str]:
    """Returns the base that the names on the command line ask for, and a note for the user."""
    if nanogpt.is_meant(arguments):
        base, why = nanogpt.DEFAULTS, f"dataset={dict(arguments.overrides)['dataset']}"
    elif cs336.is_meant(arguments):
        base, why = cs336.DEFAULTS, "train_data_path=*.ids"
    else:
        return "", ""
    choose = "to start from another file: --config FILE"
    return base, f"{why} without a file starts from {_as_written(base)}; {choose}"


def _gives_nothing(schema: Schema, default: Layer) -> bool:
    """Returns whether the default file is missing or holds nothing but defaults."""
    if not os.path.exists(default.source):
        return True
    defaults = {key: option.default for key, option in schema.options.items()}
    values = {key: given.value for key, given in default.given.items()}
    return values.items() <= defaults.items() and not (default.notes or default.problems)


def _is_file(source: str, path: str) -> bool:
    return os.path.exists(source) and os.path.samefile(source, path)


def _as_written(path: str) -> str:
    """Returns a path as the user would write it."""
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside
