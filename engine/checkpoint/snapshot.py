"""Copies a run's state to host memory, so that training goes on while it is written.

Of a tensor that every process holds whole the main one keeps a copy; of a sharded tensor (DTensor)
each process copies its own shard. While the file is written, the main process receives the shards
of one tensor at a time, so that it never holds a sharded model whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor, Shard

from engine.checkpoint.contents import check_finite, leaves
from engine.checkpoint.stream import PendingStorage, PendingTensor
from engine.hardware.distributed import World
from engine.hardware.memory import free_bytes, pinned_bytes, ran_out
from engine.monitor import console
from settings.formatting import format_bytes

_FREE_SHARE = 0.9  # of a machine's free memory that copies may take


@dataclass(frozen=True)
class LocalShard:
    """The part of a sharded tensor that this process holds, and where the others are."""

    local: Tensor
    shape: torch.Size
    """Of the whole tensor."""
    dim: int
    """The dimension that is cut, as `torch.chunk` cuts it: the last parts may be short or none."""
    ranks: list[int]
    """The processes that send a part, in order; rank 0 is the first."""

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.shape.numel() * self.local.itemsize

    def exchange(self, world: World, memory: Tensor) -> Tensor:
        """Returns the whole tensor on rank 0; the others send their part and return that.

        Collective, in the threads that save. memory: 2 * nbytes on rank 0, for the result.
        """
        group = world.saving_group
        if not world.is_main:
            if world.rank in self.ranks and self.local.numel():
                dist.send(self.local.cpu().contiguous(), dst=0, group=group)
            return self.local
        numbers = memory.view(self.local.dtype)
        whole = numbers[: self.shape.numel()].view(self.shape)
        for rank, part in zip(self.ranks, whole.chunk(len(self.ranks), self.dim), strict=False):
            if rank == 0:
                part.copy_(self.local)
            elif part.is_contiguous():
                dist.recv(part, src=rank, group=group)
            else:
                received = numbers[whole.numel() :][: part.numel()].view(part.shape)
                dist.recv(received, src=rank, group=group)
                part.copy_(received)
        return whole


@dataclass
class Snapshot:
    """The state of a run after one step, on its way into a file."""

    world: World
    step: int
    copies: dict[int, UntypedStorage]
    """By the identity of the storage copied; where it is empty, tensors are written as they are."""
    state: dict[str, Any] = field(default_factory=dict)
    """On rank 0: what `save_checkpoint` takes."""
    shards: list[LocalShard] = field(default_factory=list)
    """In the order of the file."""
    _pending: dict[int, PendingStorage] = field(default_factory=dict)
    _exchanged: int = 0
    _memory: Tensor | None = None

    def exchange_rest(self) -> None:
        """Exchanges the shards that are left: all on other processes than rank 0, and there those
        of a file that could not be written, so that nobody waits for ever."""
        while self._exchanged < len(self.shards):
            self._exchange()

    def _exchange(self) -> Tensor:
        shard = self.shards[self._exchanged]
        self._exchanged += 1
        if self._memory is None:
            # One block for all: freed and asked for again, the C library would take more and more.
            most = max(shard.nbytes for shard in self.shards) if self.world.is_main else 0
            self._memory = torch.empty(2 * most, dtype=torch.uint8)
        return shard.exchange(self.world, self._memory[: 2 * shard.nbytes])

    def place(self, name: str, value: Any) -> Any:
        """Returns what stands in the snapshot for a value of the state."""
        if not isinstance(value, Tensor):
            return value
        if not isinstance(value, DTensor):
            return self._copy(value)
        local, (dim, ranks) = value.to_local(), shard_layout(value)
        key = local.untyped_storage()._cdata  # tied tensors share it, on all processes alike
        if key not in self._pending:
            self.shards.append(LocalShard(self._copy(local), value.shape, dim, ranks))
            fetch = partial(self._fetch, name)
            self._pending[key] = PendingStorage(value.dtype, value.numel(), fetch)
        return PendingTensor(value.shape, self._pending[key])

    def _copy(self, tensor: Tensor) -> Tensor:
        storage = self.copies.get(tensor.untyped_storage()._cdata)
        if storage is None:
            return tensor
        layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, *layout)

    def _fetch(self, name: str) -> Tensor:
        whole = self._exchange()
        if name.startswith("model."):
            check_finite({name.removeprefix("model."): whole}, self.step)
        return whole


class SnapshotTaker:
    """Takes snapshots, one at a time; each uses the host memory of the one before."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._buffers: list[UntypedStorage] = []
        self._told = False

    def take(self, state: dict[str, Any]) -> tuple[Snapshot, bool]:
        """Returns a snapshot of a state, and whether it is a copy.

        Collective. Where some machine has no memory for the copy, no process makes one: the state
        must then stay as it is until the snapshot is written.
        """
        kept = (self._kept(value) for _, value in leaves(state) if isinstance(value, Tensor))
        storages = [tensor.untyped_storage() for tensor in kept if tensor is not None]
        sources = {storage._cdata: storage for storage in storages}  # tied tensors share one
        copied = self._make_room([storage.nbytes() for storage in sources.values()])
        copies = dict(zip(sources, self._buffers, strict=True)) if copied else {}
        on_cuda = self._world.device.type == "cuda"
        for key, buffer in copies.items():
            # Elsewhere nothing below would wait for the copies: Apple's GPUs make them late, too.
            buffer.copy_(sources[key], non_blocking=on_cuda)
        if on_cuda:
            torch.cuda.current_stream(self._world.device).synchronize()
        snapshot = Snapshot(self._world, state["train"]["step"], copies)
        placed = map_leaves(state, snapshot.place)
        snapshot.state = placed if self._world.is_main else {}
        return snapshot, copied

    def _kept(self, tensor: Tensor) -> Tensor | None:
        """Returns what this process writes or sends of a tensor."""
        if not isinstance(tensor, DTensor):
            return tensor if self._world.is_main else None
        return tensor.to_local() if self._world.rank in shard_layout(tensor)[1] else None

    def _make_room(self, sizes: list[int]) -> bool:
        """Makes buffers of these sizes; returns whether all processes have the memory."""
        if [buffer.nbytes() for buffer in self._buffers] != sizes:
            self._buffers.clear()
        on_cuda = self._world.device.type == "cuda"
        needed = 0 if self._buffers else sum(map(pinned_bytes, sizes) if on_cuda else sizes)
        free = free_bytes(torch.device("cpu"))
        needs = self._world.all_gather([needed])
        first = self._world.rank - self._world.rank % self._world.local_size
        on_machine = sum(each for (each,) in needs[first : first + self._world.local_size])
        short = free is not None and on_machine > _FREE_SHARE * free
        if self._world.any_rank(short or not self._allocate(sizes, on_cuda)):
            self._buffers.clear()
            if self._world.is_main and not self._told:
                console.warning(
                    f"A copy of the state needs {format_bytes(on_machine)} of host memory, more "
                    "than is free: training waits while a checkpoint is written."
                )
            self._told = True
            return False
        return True

    def _allocate(self, sizes: list[int], pinned: bool) -> bool:
        """Makes the buffers that are missing; returns False where the system refuses the memory.

        pinned: memory that takes a GPU's data at full speed. Systems limit it in ways of their own.
        """
        empty = partial(torch.empty, dtype=torch.uint8, pin_memory=pinned)
        try:
            self._buffers = self._buffers or [empty(size).untyped_storage() for size in sizes]
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return False
        return True


def shard_layout(tensor: DTensor) -> tuple[int, list[int]]:
    """Returns the dimension that is cut and the processes that hold the parts, of one replica."""
    ranks, dim = tensor.device_mesh.mesh, 0
    for axis in reversed(range(ranks.ndim)):
        placement = tensor.placements[axis]
        if isinstance(placement, Shard):
            dim = placement.dim
        else:
            ranks = ranks.select(axis, 0)
    assert ranks.ndim <= 1, f"sharded along several dimensions: {tensor.placements}"
    return dim, ranks.reshape(-1).tolist()


def map_leaves(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """Returns nested dicts and lists anew, with `change(dotted name, value)` in place of values."""
    if isinstance(value, dict):
        mapped = copy.copy(value)  # of its class, with what torch notes on the dict of a model
        for key in value:
            mapped[key] = map_leaves(value[key], change, f"{name}.{key}" if name else str(key))
        return mapped
    if isinstance(value, list | tuple):
        items = enumerate(value)
        return type(value)(map_leaves(item, change, f"{name}.{number}") for number, item in items)
    return change(name, value)
