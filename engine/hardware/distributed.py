"""The processes of a run: who this one is, how they talk, and the model they share.

The launcher's environment is read here and nowhere else. The methods of a `World` that talk to
other processes are collective: either every process calls them, in the same order, or none does.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError, DistributedConfig, SystemConfig, UserError
from engine.hardware.device import prepare_device, resolve_device
from settings.slurm import RENDEZVOUS, started_by_srun

T = TypeVar("T")

# What torchrun sets besides WORLD_SIZE.
_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may prepare data for as long


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and the device this one computes on."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Processes on this machine."""
    saving_group: dist.ProcessGroup | None = None
    """All processes once more, for the threads that write checkpoints: what these send must not mix
    with what training sends."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0: the only process that logs and writes files."""
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the CPU."""
        return self.device.type == "cpu"

    @property
    def device_name(self) -> str:
        """In words: `cuda:0 (NVIDIA H100 80GB HBM3)`, `cpu (2 threads) x 4 processes`."""
        name = str(self.device)
        if self.device.type == "cuda":
            name = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        elif self.device.type == "cpu":
            name = f"cpu ({torch.get_num_threads()} threads)"
        return name if self.size == 1 else f"{name} x {self.size} processes"

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over all processes, reduced in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_min(self, value: int) -> int:
        """Returns the smallest `value` of all processes."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MIN)
        return int(box)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Returns the elementwise maximum of `values` over all processes, reduced in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Returns whether `flag` is set in some process."""
        return bool(self.all_reduce_max(torch.tensor(flag, dtype=torch.uint8)))

    def all_gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Returns the `numbers` of each process, by rank; all give equally many."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def broadcast(self, value: T) -> T:
        """Returns the `value` of rank 0, a plain Python object."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes by rank on rank 0; on others only their own.

        Callers need not ask which rank they are, but only rank 0's result means anything.
        """
        if self.size == 1:
            return [value]
        box: list[T] = [value] * self.size
        dist.gather_object(value, box if self.is_main else None)
        return box if self.is_main else [value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Returns on every rank what `work` returns on rank 0, the only one that does it.

        A UserError is raised on all of them.
        """
        if self.size == 1:
            return work()
        result: list[T] = []
        error: UserError | None = None
        if self.is_main:
            try:
                result.append(work())
            except UserError as found:
                error = found
        result, error = self.broadcast((result, error))
        if error is not None:
            error.on_all_ranks = True
            raise error
        return result[0]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block on rank 0 first; the other ranks then find its work done.

        If the block raises on rank 0, that process ends without reaching the barrier, and the
        others end with an error for which `is_lost_peer` is true.
        """
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()


@contextlib.contextmanager
def enter_world(system: SystemConfig, distributed: DistributedConfig) -> Iterator[World]:
    """Joins the processes that torchrun or srun started and resolves `system.device`; raises
    ConfigError.

    From here on, ranks other than 0 print nothing on standard output, and torch is set up for the
    device.
    """
    size = _launcher_number("WORLD_SIZE", 1, 10**6) if os.environ.get("WORLD_SIZE") else 1
    device = resolve_device(system.device)
    if size == 1:
        prepare_device(device)
        yield World(rank=0, size=1, device=device)
        return
    device = _join(size, device, distributed.backend)
    # Launchers that do not say how many processes a machine has are taken to use one machine.
    known = "LOCAL_WORLD_SIZE" in os.environ
    local_size = _launcher_number("LOCAL_WORLD_SIZE", 1, size) if known else size
    saving_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    yield World(dist.get_rank(), size, device, local_size, saving_group)
    # The process group is not destroyed here: see `end_process`.


def _join(size: int, device: torch.device, backend: str) -> torch.device:
    """Joins the process group and returns the device of this process."""
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if missing and started_by_srun():
        raise ConfigError(
            f"srun started {size} tasks, but did not get {', '.join(missing)}. Write before srun:"
            f"\n{RENDEZVOUS}\n"
            "`python train.py ... --slurm` prints a script that has these lines."
        )
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set: several processes are "
            f"started with torchrun --standalone --nproc_per_node={size} train.py ..."
        )
    rank = _launcher_number("RANK", 0, size - 1)
    local = _launcher_number("LOCAL_RANK", 0, size - 1)
    _launcher_number("MASTER_PORT", 0, 65535)  # only checked: torch reads it itself
    if device.type == "cuda":
        device = _gpu_of(local)
    prepare_device(device)  # before the processes meet: NCCL takes the current GPU
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # stays open until the process ends
        logging.disable(logging.WARNING)
    backends = _backends(backend, device)
    try:
        dist.init_process_group(backends, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the {size} processes of WORLD_SIZE did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})."
        ) from None
    return device


def _gpu_of(local_rank: int) -> torch.device:
    """Returns the GPU of this process; raises ConfigError if there is none."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        # --gpus-per-task lets each task see its own GPUs only; here LOCAL_RANK picks among all.
        how = "Use srun with --gpus-per-node, not --gpus-per-task, and as many tasks"
        remedy = how if started_by_srun() else "Lower --nproc_per_node"
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: torch sees {count}. {remedy}."
        )
    return torch.device("cuda", local_rank)


def _backends(option: str, device: torch.device) -> str:
    """Returns the backends for `distributed.backend`, as torch.distributed names them."""
    on_cuda = device.type == "cuda"
    if option == "nccl" and not on_cuda:
        raise ConfigError(f"distributed.backend=nccl needs CUDA, and system.device is {device}.")
    if option == "nccl" or (option == "auto" and on_cuda):
        # Python objects and single numbers are CPU tensors, so CUDA runs need gloo as well.
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _launcher_number(name: str, least: int, most: int) -> int:
    """Returns an integer of the launcher's environment; raises ConfigError outside least..most."""
    text = os.environ[name]
    number = int(text) if re.fullmatch("[0-9]{1,7}", text) else -1
    if not least <= number <= most:
        raise ConfigError(
            f"the environment variable {name}={text!r} is not a whole number from {least} to "
            f"{most}. Unset it to train in one process; torchrun and srun set it for several."
        )
    return number


def is_main_process() -> bool:
    """Returns whether this process prints for all ranks, also before they have joined."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether an error of torch means that another process has ended."""
    if not dist.is_initialized():
        return False
    text = str(error)
    # gloo and NCCL word a lost peer in many ways, so every error that names them counts, and those
    # of the store through which they meet. The price: a failure of NCCL itself is also reported as
    # a lost peer.
    signs = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def wait_for_all() -> None:
    """Waits until every process has done its work.

    torchrun and srun kill the others half a minute after the first process has ended, and the main
    one may still have files to write.
    """
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU: a barrier would take a GPU


def end_process(code: int) -> NoReturn:
    """Ends the process with an exit code; call it when everything is saved."""
    # Destroying gloo's process group, or a model that uses it, can wait for ever for processes that
    # have gone, so nothing is destroyed.
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """Returns the model whose backward pass averages gradients over all processes.

    With one process that is `model` itself, and a sharded model does it already. DDP copies the
    weights of rank 0 to the others; its parameters are `model`'s own.
    """
    if world.size == 1 or isinstance(model, FSDPModule):
        return model
    devices = None if world.device.type != "cuda" else [world.device]
    # Buffers are frozen weights, equal from the start. torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
    wrapped = DistributedDataParallel(model, device_ids=devices, **options)
    # DDP's destructor can wait for ever for processes that have gone. The trainer is freed before
    # the process ends, so this second reference keeps DDP from being destroyed with it.
    # `end_process` then ends the process without destroying anything.
    atexit.register(lambda: wrapped)
    return wrapped


def scale_loss_for_averaging(loss: Tensor, world: World) -> Tensor:
    """Multiplies the loss by the number of processes.

    DDP and FSDP average gradients, but losses are already divided by the tokens of all processes.
    """
    return loss if world.size == 1 else loss * world.size


def no_sync_until_last(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-step; gradients are exchanged in the last one of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif not last and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
