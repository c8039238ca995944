"""A hash of all weights, by which two runs see whether they still are the same.

    hash of a tensor = sum over its elements of  bits(i, j, ...) * r_0(i) * r_1(j) * ...  mod 2^64

where bits are those of the number as a whole number, and r_d(i) is an odd pseudo-random number of
64 bits for index i of dimension d. An odd factor is invertible, so every change of one element
changes the sum; two changes cancel out by chance only. A sum does not depend on its order: each
process of a sharded model adds up its own slice, and the device does it as it likes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.hardware.distributed import World
from engine.hardware.sharding import is_of_first_replica, shard_begins

# Elements that are summed at once: on a CPU what stays in a core's cache as int64.
_CHUNK, _CHUNK_ON_CPU = 2**22, 2**16
_TABLE = 2**16  # factors of a dimension that are kept
_MIXING = ((33, 0x1E3779B97F4A7C15), (30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB))
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def weights_hash(state: Mapping[str, Tensor], world: World | None = None) -> str:
    """Returns 16 hexadecimal digits of a model's `state_dict()`, or of that in a checkpoint."""
    return f"{sum(tensor_hashes(state, world).values()) % 2**64:016x}"


@torch.no_grad()
def tensor_hashes(state: Mapping[str, Tensor], world: World | None = None) -> dict[str, int]:
    """Returns a hash of 64 bits of each tensor, with its name, type and shape.

    world: of a sharded model, whose processes add up their sums: a collective. Waits for the device
    once.
    """
    if not state:
        return {}
    sharded = any(isinstance(tensor, DTensor) for tensor in state.values())
    device = torch.device("cpu") if world is None else world.device
    sums = torch.stack([_sum(tensor, sharded, world).to(device) for tensor in state.values()])
    if sharded and world is not None:
        sums = world.all_reduce_sum(sums)
    found = zip(state.items(), sums.tolist(), strict=True)
    return {name: _named(name, tensor, total) for (name, tensor), total in found}


def _sum(tensor: Tensor, sharded: bool, world: World | None) -> Tensor:
    """Returns the sum () over the elements that this process adds."""
    zero = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if isinstance(tensor, DTensor):
        if not is_of_first_replica(tensor):
            return zero
        return position_sum(tensor.to_local(), shard_begins(tensor))
    # What is whole on all processes of a sharded model counts once.
    if sharded and world is not None and not world.is_main:
        return zero
    return position_sum(tensor, [0] * tensor.ndim)


def position_sum(tensor: Tensor, begins: Sequence[int]) -> Tensor:
    """Returns the sum () of a slice of a tensor, as int64 that wraps around.

    begins: the index in the whole tensor of the slice's first element, in each dimension.
    """
    # Numbers of 64 bits are taken as two: their highest bit would be the same at every place.
    if tensor.element_size() == 8 or not tensor.ndim:
        tensor, begins = tensor.unsqueeze(-1), [*begins, 0]
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    return _weighted(bits, begins, 0)


def _weighted(bits: Tensor, begins: Sequence[int], dim: int) -> Tensor:
    """Returns the sum () over integers whose first dimension is `dim` of the tensor."""
    device = bits.device
    total = torch.zeros((), dtype=torch.int64, device=device)
    if not bits.numel():
        return total
    most = _CHUNK_ON_CPU if device.type == "cpu" else _CHUNK
    inner = bits[0].numel()
    if inner > most:
        outer = _factors(dim, begins[0], len(bits), device)
        parts = [_weighted(part, begins[1:], dim + 1) for part in bits]
        return (torch.stack(parts) * outer).sum()
    begin = begins[0]
    for part in torch.split(bits, most // inner):
        places = zip((begin, *begins[1:]), part.shape, strict=True)
        for inner_dim, (first, length) in reversed(list(enumerate(places, dim))):
            part = (part * _factors(inner_dim, first, length, device)).sum(-1)
        begin += most // inner
        total += part
    return total


def _factors(dim: int, begin: int, length: int, device: torch.device) -> Tensor:
    """Returns the odd factors of some indices of a dimension, (length,)."""
    if begin + length <= _TABLE:
        return _table(dim, device)[begin : begin + length]
    return _draw(dim, begin, length, device)


@lru_cache(maxsize=16)
def _table(dim: int, device: torch.device) -> Tensor:
    return _draw(dim, 0, _TABLE, device)


def _draw(dim: int, begin: int, length: int, device: torch.device) -> Tensor:
    # The finalizer of splitmix64 (data/loading/order.py), with shifts that keep the sign.
    z = torch.arange(begin, begin + length, device=device) + dim * 2**40
    for shift, factor in _MIXING:
        z = (z ^ (z >> shift)) * factor
    return (z ^ (z >> 31)) | 1


def _named(name: str, tensor: Tensor, total: int) -> int:
    text = f"{name} {tensor.dtype} {list(tensor.shape)} {total % 2**64}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
