"""One model in several processes: each adds its gradients to those of the others.

The one idea: losses are sums over tokens divided by the tokens of the whole step, so gradients are
added up, never averaged, and how many processes share a step does not change it.
"""

# No postponed annotations here: DDP looks at those of its communication hook.
import contextlib
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from engine.world import World


def parallelize(model: nn.Module, world: World) -> nn.Module:
    """The model whose backward pass sums gradients over all processes; itself where there is one.

    Weights become those of the main process. Parameters stay `model`'s own.
    """
    if world.size == 1:
        return model
    devices = None if world.device.type != "cuda" else [world.device]
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _add_up)
    return wrapped


def _add_up(_state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook; DDP's own divides by the number of processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[list[torch.Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0])


def without_sync(model: nn.Module, hold: bool) -> AbstractContextManager[None]:
    """Around a micro-step: gradients stay here while `hold`, until the last one of the step."""
    if hold and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
