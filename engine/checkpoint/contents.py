"""The content of a checkpoint, described as types.

`check_type` compares a loaded checkpoint with `Content` before anything of it is used, so that a
damaged or foreign file is one message that names the entry and not an error deep in torch. Before a
save, `check_plain` and `check_finite` refuse what could not be loaded or should not be kept.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor

from config import CheckpointError, ConfigError, NonFiniteError
from engine.checkpoint.stream import PendingTensor
from engine.train_state import ADDED, TrainState

_PLAIN = (str, int, float, bool, NoneType)
_LARGEST = 2**63 - 1
_MISFITS = (ValueError, TypeError, IndexError, AttributeError, ArithmeticError, RuntimeError)


class ShapeOptions(TypedDict):
    """Options that every model has. Others may be missing: later ones have defaults."""

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int


class RunOptions(TypedDict):
    """Options that decide which steps were made."""

    block_size: int
    batch_size: int
    init_from: str


class SavedConfig(TypedDict):
    """The config of the run, by sections; `Config.from_dict` checks the rest of it."""

    model: ShapeOptions
    training: RunOptions


class ParameterGroup(TypedDict):
    """Its hyperparameters are not read: those of the present config count."""

    params: list[int]


class OptimizerState(TypedDict):
    """`state_dict()` of the optimizer."""

    state: dict[int, dict[str, Tensor | int | float | dict[str, Any]]]
    param_groups: list[ParameterGroup]


class PrecisionState(TypedDict):
    """The loss scale of float16, and the scales of FP8 operands."""

    scaler: dict[str, float]
    fp8: dict[str, Any]


class DeviceGenerators(TypedDict, total=False):
    """State of the device's generator, if the device was not the CPU."""

    cuda: Tensor
    mps: Tensor


class Generators(DeviceGenerators):
    """Random generators of one process (engine/train_state.py)."""

    torch: Tensor
    python: tuple[int, list[int], float | None]
    numpy: tuple[str, list[int], int, int, float]


class SavedLanes(TypedDict):
    """Where all lanes of a text stand."""

    lanes: int
    first_lane: int
    positions: list[tuple[int, int, int]]
    """Of each lane: epoch, segment_index, token (`Position` in data/loading/packing.py)."""


class SavedSource(SavedLanes):
    """Where the lanes of a source of a mixture stand, and how many rows it has given."""

    name: str
    weight: float
    rows: int
    rows_at_weight: int


class SavedDataState(TypedDict):
    """The data state of all processes (`LoadPlan.data_state` in data/loading/load_plan.py), with
    the entries of SavedLanes or, of a mixture, of SavedSources."""

    version: int
    sequences_per_step: int
    block_size: int
    seed: int
    shuffle: bool


class SavedSources(TypedDict):
    """What the data state of a mixture holds of its sources, in their order."""

    sources: list[SavedSource]


class SavedData(TypedDict):
    """What tells this text from another (data/sources/dataset.py)."""

    fingerprint: str


class SavedTokenizer(TypedDict):
    """What makes text of tokens (data/tokenizers/)."""

    kind: str


class Content(TypedDict):
    """A checkpoint of format 3. A whole number in it is at least 0."""

    format: int
    model: dict[str, Tensor]
    optimizer: OptimizerState
    precision: PrecisionState
    train: TrainState
    """As a dict."""
    cursor: SavedDataState
    """The data state, under the name that it had when format 3 was made."""
    rng: list[Generators]
    """Of each process."""
    config: SavedConfig
    data: SavedData
    tokenizer: SavedTokenizer


_ALLOW_EXTRA = (
    ShapeOptions,
    RunOptions,
    SavedConfig,
    ParameterGroup,
    SavedLanes,
    SavedSource,
    SavedSources,
    SavedDataState,
    SavedData,
    SavedTokenizer,
)
"""Dicts that may have entries which their type does not name."""
_NAMES = {
    int: "a whole number from 0 on",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "none",
    Tensor: "a tensor",
}


def check_type(value: object, hint: Any, place: str = "") -> None:
    """Raises ValueError, which names the entry, if `value` is not of the type `hint`."""
    kind, inner = get_origin(hint), get_args(hint)
    if is_typeddict(hint) or is_dataclass(hint):
        _check_fields(value, hint, place)
    elif kind is dict and isinstance(value, dict):
        for key, item in value.items():
            check_type(key, inner[0], f"a key of {place}")
            check_type(item, inner[1], f"{place}.{key}")
    elif kind is list and isinstance(value, list):
        for number, item in enumerate(value):
            check_type(item, inner[0], f"{place}.{number}")
    elif kind is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        for number, (item, each) in enumerate(zip(value, inner, strict=True)):
            check_type(item, each, f"{place}.{number}")
    elif hint is not Any:
        kinds = inner if kind is UnionType else (hint,)
        if not any(_is(value, each) for each in kinds):
            names = [_NAMES.get(each) or f"a {get_origin(each).__name__}" for each in kinds]
            raise ValueError(f"{place} is {_described(value)}, expected {' or '.join(names)}")


def check_content(content: Any) -> None:
    """Raises ValueError, which names the entry, for what is no `Content`."""
    check_type(content, Content)
    cursor = content["cursor"]
    check_type(cursor, SavedSources if "sources" in cursor else SavedLanes, "cursor")


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turns the exceptions that unexpected content raises into a CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path}: does not fit this version: {error} is missing.") from error
    except (ConfigError, *_MISFITS) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{path}: does not fit this version: {reason[:500]}.") from error


def _check_fields(value: object, hint: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {_described(value)}, expected a dict")
    hints, before = get_type_hints(hint), f"{place}." if place else ""
    if is_dataclass(hint):
        optional = {field.name for field in fields(hint) if field.metadata == ADDED}
    else:
        optional = hint.__optional_keys__
    if missing := [name for name in hints if name not in value and name not in optional]:
        raise ValueError(f"{before}{missing[0]} is missing")
    unknown = [key for key in value if key not in hints]
    if unknown and hint not in _ALLOW_EXTRA:
        raise ValueError(f"{before}{str(unknown[0])[:40]!a} is not known here")
    for name in hints:
        if name in value:
            check_type(value[name], hints[name], before + name)


def _is(value: object, kind: Any) -> bool:
    if kind is Tensor:
        if not isinstance(value, Tensor) or type(value) is not Tensor:
            return False
        return value.layout is torch.strided and not value.is_meta and not value.is_quantized
    if isinstance(value, int) and kind is int:
        return type(value) is int and 0 <= value <= _LARGEST
    kind = get_origin(kind) or kind
    return type(value) is kind or (kind is float and type(value) is int)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor ({value.layout}, {value.device.type}) of shape {list(value.shape)}"
    return ascii(value)[:40] if type(value) in _PLAIN else f"a {_type_name(value)}"


def check_plain(value: object, place: str = "checkpoint") -> None:
    """Asserts that `value` can be loaded with `weights_only=True`; names the offending place.

    Types are compared exactly: numpy.float64 is a float, but pickles as a numpy object.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        assert isinstance(value, dict)
        for key, item in value.items():
            assert type(key) in (str, int), f"{place} has a key of type {_type_name(key)}: {key!r}"
            check_plain(item, f"{place}.{key}")
    elif kind in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, item in enumerate(value):
            check_plain(item, f"{place}.{index}")
    else:
        known = kind in (Tensor, PendingTensor) or kind in _PLAIN
        assert known, f"{place} is {_type_name(value)}"


def _type_name(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def leaves(value: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted place, value) of everything inside nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def check_finite(weights: dict[str, Any], step: int) -> None:
    """Raises NonFiniteError naming the first tensor with NaN or infinity.

    Pending tensors are skipped: their numbers are checked once they are fetched.
    """
    # One sum over all weights runs at memory speed. It may overflow without a NaN in them, so each
    # number is looked at only if the sum is not finite.
    found = leaves(weights)
    floating = [(n, t) for n, t in found if isinstance(t, Tensor) and t.is_floating_point()]
    total = torch.zeros(())
    for _, tensor in floating:
        total = total.to(tensor.device) + tensor.sum(dtype=torch.float32)
    if total.isfinite():
        return
    for name, tensor in floating:
        count = int((~tensor.isfinite()).sum())
        if count:
            raise NonFiniteError(
                f"{name} has {count} NaN or infinite values at step {step}: no checkpoint is "
                "saved from them; resume from an earlier one, with a lower learning rate."
            )


def tensor_bytes(content: object) -> int:
    """Returns the bytes of all storages, shared ones once: what the file will hold."""
    sizes: dict[int, int] = {}
    for _, value in leaves(content):
        if isinstance(value, PendingTensor):
            sizes[id(value.storage)] = value.storage.nbytes
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
