"""One model in several processes: each adds its gradients to those of the others.

The one idea: losses are sums over tokens divided by the tokens of the whole step, so gradients have
to be added up, and how many processes share a step does not change it. DDP takes their mean, which
`whole` makes up for.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.hardware.world import World

_KEPT: list[nn.Module] = []  # until the process ends: see `end_process` in engine/hardware/world.py


def parallelize(model: nn.Module, world: World) -> nn.Module:
    """The model whose backward pass averages gradients over all processes; itself if there is one.

    Weights become those of the main process. Parameters stay `model`'s own.
    """
    if world.size == 1:
        return model
    devices = None if world.device.type != "cuda" else [world.device]
    wrapped = DistributedDataParallel(
        model,
        device_ids=devices,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # frozen weights: equal from the start
    )
    _KEPT.append(wrapped)
    return wrapped


def whole(share: Tensor, world: World) -> Tensor:
    """What to take backward so that the gradients' mean is the sum of those of all `share`s."""
    return share if world.size == 1 else share * world.size


def without_sync(model: nn.Module, hold: bool) -> AbstractContextManager[None]:
    """Around a micro-step: gradients stay here while `hold`, until the last one of the step."""
    if hold and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
