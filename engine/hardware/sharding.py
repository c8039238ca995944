"""Sharding (FSDP2): every process keeps a slice of each weight, its gradient and optimizer state.

    mesh = shard_mesh("fsdp", world)
    with torch.device("meta"):              # no process ever holds the whole model
        model = build_model(config)
    shard_model(model, mesh, torch.bfloat16)
    model.to_empty(device=world.device)
    draw_weights(model)                     # or load_weights(model, weights)

`fully_shard` of torch gathers a group of weights from all processes when its modules compute, in
forward and backward, and sums and cuts gradients in backward. Between steps a weight is a `DTensor`
whose shape, `numel` and `nbytes` are those of the whole; `to_local()` is the slice of this process.

What is computed is what DDP computes. Autocast would cast the weights of products to 16 bits in
each forward pass; here the groups of `LanguageModel.shard_groups` are cast before they travel.
Everything else, embedding, norms and head, is gathered once per pass as it is, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from config import ConfigError
from engine.hardware.distributed import World
from model.interface import LanguageModel
from settings.formatting import format_bytes

# Methods that compute with weights and are not called by `forward`: they gather them too.
_FORWARD_METHODS = ("init_cache", "prefill_or_decode", "active_fraction")


def shard_counts(strategy: str, world: World) -> tuple[int, int]:
    """Returns the number of replicas of the model, and of the processes that share each; hsdp
    shards within a node."""
    if strategy == "hsdp":
        return world.size // world.local_size, world.local_size
    return (1, world.size) if strategy == "fsdp" else (world.size, 1)


def shard_mesh(strategy: str, world: World) -> DeviceMesh | None:
    """Returns the processes that `distributed.strategy` shards over: (shard,), or (replicate,
    shard) with several replicas. None: not sharded. A collective. Raises ConfigError where hsdp
    finds nodes with different numbers of processes: their meshes would wait for each other."""
    counts = {count for (count,) in world.all_gather([world.local_size])}
    if strategy == "hsdp" and len(counts) > 1:
        raise ConfigError(
            "distributed.strategy=hsdp shards within nodes of equally many processes, and these "
            f"have from {min(counts)} to {max(counts)}. Set it to fsdp."
        )
    replicas, shards = shard_counts(strategy, world)
    if shards == 1:
        return None
    kind = world.device.type
    if replicas == 1:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def shard_model(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards a model in place, before its optimizer is built.

    dtype: that products read hidden weights in. Gradients are averaged over the mesh in float32.
    """
    shards = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter.shape, shards))

    # fully_shard moves buffers to the device; BDH's frequencies have to stay on the CPU.
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]
    for group in model.shard_groups():
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(group, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    # The rest is used at the end of forward and at the beginning of backward: it stays in between.
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        reshard_after_forward=False,
        shard_placement_fn=place,
    )
    for buffer, data in buffers:
        buffer.data = data
    for method in _FORWARD_METHODS:
        register_fsdp_forward_method(model, method)


def shard_dim(shape: Sequence[int], shards: int) -> int:
    """Returns the dimension in which a weight is cut: the first, or the largest that can be cut
    evenly where the first cannot: of BDH's encoder (H, D, N) the first are four heads.

    Only the first may be cut unevenly (a rule of torch).
    """
    even = [dim for dim, length in enumerate(shape) if length % shards == 0]
    return 0 if not even or even[0] == 0 else max(even, key=lambda dim: shape[dim])


def is_sharded(model: nn.Module) -> bool:
    """Returns whether `shard_model` has sharded the model."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Frees the weights that a forward pass without backward has left gathered. Until then they are
    the model's parameters, and a change of the slices does not reach them."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a sharded tensor, on every process; a plain one as it is. A collective
    for sharded tensors."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole.detach()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Returns this process's slice of a whole tensor, copied to the device of `like`, as a sharded
    tensor with its placement. Without communication; where `like` is plain, `full` as it is."""
    if not isinstance(like, DTensor):
        return full
    local = full.detach()
    for mesh_dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            dim, begin, length = _shard_range(like, mesh_dim, placement)
            local = local.narrow(dim, begin, length)
    return DTensor.from_local(
        local.clone(memory_format=torch.contiguous_format).to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=full.shape,
        stride=like.stride(),
    )


def _shard_range(tensor: DTensor, mesh_dim: int, placement: Shard) -> tuple[int, int, int]:
    """Returns the dimension that is cut, and where the slice of this process begins in it, and its
    length."""
    mesh, length = tensor.device_mesh, tensor.shape[placement.dim]
    size = -(-length // mesh.size(mesh_dim))  # the last slices may be shorter
    begin = min(mesh.get_local_rank(mesh_dim) * size, length)
    return placement.dim, begin, min(size, length - begin)


def shard_begins(tensor: DTensor) -> list[int]:
    """Returns the index of the first element of this process's slice, in each dimension."""
    begins = [0] * tensor.ndim
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            dim, begins[dim], _ = _shard_range(tensor, mesh_dim, placement)
    return begins


def is_of_first_replica(tensor: DTensor) -> bool:
    """Returns whether the slice of this process is of the first of the replicas of a tensor."""
    mesh = tensor.device_mesh
    return all(
        isinstance(placement, Shard) or mesh.get_local_rank(mesh_dim) == 0
        for mesh_dim, placement in enumerate(tensor.placements)
    )


@torch.no_grad()
def draw_weights(model: LanguageModel) -> None:
    """Draws the weights of a sharded model: one at a time is whole, on the CPU. They are those that
    the same seed gives on one process."""
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        model.init_weight(name, whole)
        parameter.copy_(shard_like(whole, parameter))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads a state dict of whole tensors, of which a sharded model takes its slices."""
    own = model.state_dict()
    model.load_state_dict(
        {name: shard_like(value, own.get(name, value)) for name, value in weights.items()}
    )


def local_bytes(model: nn.Module) -> int:
    """Returns the memory of this process's slices of the weights."""
    return sum(
        p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()
    )


def sharding_lines(strategy: str, model: nn.Module, world: World) -> list[str]:
    """Returns a line that says what `distributed.strategy` shards; none for ddp."""
    if strategy not in ("fsdp", "hsdp"):
        return []
    replicas, shards = shard_counts(strategy, world)
    if shards == 1:
        place = "process" if world.size == 1 else "process per node"
        return [f"distributed.strategy={strategy}: not sharded, with one {place}"]
    where = f"{shards} processes"
    if replicas > 1:
        where += f" of a node, the same on {replicas} nodes"
    elif strategy == "hsdp":
        where += ", as fsdp does: they are on one node"
    return [
        f"Sharded ({strategy}): weights, gradients and optimizer state over {where}; "
        f"{format_bytes(local_bytes(model))} of weights in each"
    ]
