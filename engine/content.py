"""What may be inside a checkpoint: tensors and plain values, and no NaN in the weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from config import NonFiniteError

_PLAIN = (str, int, float, bool, type(None))


def check_plain(value: object, place: str = "checkpoint") -> None:
    """Asserts that `value` loads with `weights_only=True` anywhere; names the offending place.

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
        assert kind is Tensor or kind in _PLAIN, f"{place} is {_type_name(value)}"


def _type_name(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def tensors(value: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted place, tensor) of every tensor inside nested dicts and lists."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from tensors(item, f"{place}.{key}" if place else str(key))


def check_finite(weights: dict[str, Any], step: int) -> None:
    """Raises NonFiniteError naming the first tensor with NaN or infinity.

    A sum shows at memory speed that all is well; only a sum that is not finite, which may also
    have overflowed, makes every number be looked at.
    """
    floating = [(n, t) for n, t in tensors(weights) if t.is_floating_point()]
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
    """Bytes of all storages once each: what `torch.save` writes, headers aside."""
    storages = (tensor.untyped_storage() for _, tensor in tensors(content))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
