"""nanoGPT: the defaults below its presets, and names of ours that mean something else there.

A preset of nanoGPT means what it says only on top of nanoGPT's own defaults, so its names choose
configs/nanogpt.yaml as a base, layer 0, below all files. The base is reported to the user.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from math import prod
from typing import Any

from settings.command_line import Arguments
from settings.merge import Layer
from settings.schema import Schema
from settings.values import Scalar

_PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEFAULTS = os.path.join(_PROJECT, "configs", "nanogpt.yaml")
_ONLY_ITS_NAMES = ("dataset", "bias")  # as bare names, at the top of a file
_SHAPE = ("n_layer", "n_head", "n_embd")  # of nanoGPT's GPT; here, of any model
_STEPS, _TOKENS = "training.gradient_accumulation_steps", "training.tokens_per_step"
_DECAYS, _WARMUP = "schedule.decay_lr", "schedule.warmup_iters"
_SAVES, _EVALUATES = "training.checkpoint_freq", "training.test_freq"


def has_its_names(layer: Layer) -> bool:
    """Returns whether a file is a preset, or flat with names that only nanoGPT has."""
    bare = any(given.name in _ONLY_ITS_NAMES for given in layer.given.values())
    return layer.style == "preset" or (layer.style == "flat" and bare)


def is_meant(arguments: Arguments) -> bool:
    """Returns whether a command line has `dataset=NAME`, nanoGPT's way to name token files."""
    return not Scalar(dict(arguments.overrides).get("dataset", "")).is_null


def note_on_model(arguments: Arguments, layers: Sequence[Layer]) -> str:
    """Returns a note for a user who gives a shape in nanoGPT's names and may expect its model."""
    shape = [key for key, _ in arguments.overrides if key in _SHAPE]
    named = any({"model.name", "training.init_from"} & layer.given.keys() for layer in layers)
    if len(shape) < 2 or named:
        return ""
    return f"{', '.join(shape)} shape a BDH (model.name=bdh, the default); a GPT: model.name=gpt"


def translate(schema: Schema, layers: Sequence[Layer], base: Layer | None) -> None:
    """Translates in place what nanoGPT's names mean where ours mean something else.

    base: the layer of nanoGPT's defaults, if the files stand on them.
    """
    speaks = {layer.number for layer in layers if has_its_names(layer)}
    if base is not None:  # then flat files and the command line speak its language too
        speaks |= {layer.number for layer in layers if layer.style != "sections"}
    _count_over_all_processes(schema, layers, speaks)
    _start_at_full_rate(schema, layers, speaks)
    if base is not None and _last(layers, _SAVES) is None:
        base.put(_SAVES, _value(schema, layers, _EVALUATES))  # it saves when it evaluates


def _count_over_all_processes(
    schema: Schema, layers: Sequence[Layer], speaks: Collection[int]
) -> None:
    """Its accumulation is the total of a step, whatever the number of processes."""
    giver = _last(layers, _STEPS)
    if giver is None or giver.number not in speaks:
        return
    if giver.number == 0 and any(layer.style == "preset" and layer.given for layer in layers):
        # The base's 40 are those of GPT-2. Each preset of nanoGPT that trains gives its own number.
        giver.put(_STEPS, 1)
    steps, tokens_giver = giver.given[_STEPS].value, _last(layers, _TOKENS)
    if tokens_giver is not None and tokens_giver.given[_TOKENS].value is not None:
        if tokens_giver.number == giver.number:
            return  # a rule refuses both together
        if tokens_giver.number > giver.number:
            _drop(layers, _STEPS)
            layers[-1].note(f"{_TOKENS} takes the place of gradient_accumulation_steps={steps}")
            return
    sizes = [_value(schema, layers, f"training.{name}") for name in ("batch_size", "block_size")]
    if "auto" in sizes:
        return  # a rule asks for tokens_per_step
    factors, origin = [steps, *sizes], giver.given[_STEPS].origin
    # The sizes may come from a later layer than the accumulation: the product is of the last ones.
    _drop(layers, _TOKENS)
    giver.put(_TOKENS, prod(factors), origin)
    giver.put(_STEPS, 1)
    layers[-1].note(
        f"gradient_accumulation_steps={steps} is over all processes, as in nanoGPT: "
        f"{_TOKENS} = {' * '.join(map(str, factors))} = {prod(factors)}"
    )


def _start_at_full_rate(schema: Schema, layers: Sequence[Layer], speaks: Collection[int]) -> None:
    """Without decay nanoGPT does not warm up either."""
    decays, warmup = _last(layers, _DECAYS), _last(layers, _WARMUP)
    if decays is None or warmup is None or not {decays.number, warmup.number} <= set(speaks):
        return
    if not _value(schema, layers, _DECAYS) and _value(schema, layers, _WARMUP):
        warmup.put(_WARMUP, 0)
        layers[-1].note("schedule.decay_lr=false means no warm-up either, as in nanoGPT")


def _last(layers: Sequence[Layer], key: str) -> Layer | None:
    """Returns the last layer that gives an option."""
    return next((layer for layer in reversed(layers) if key in layer.given), None)


def _value(schema: Schema, layers: Sequence[Layer], key: str) -> Any:
    giver = _last(layers, key)
    return giver.given[key].value if giver else schema.options[key].default


def _drop(layers: Sequence[Layer], key: str) -> None:
    for layer in layers:
        layer.given.pop(key, None)
