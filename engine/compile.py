"""torch.compile where it pays and where a compiler is present; said at the start, never fatal."""

from __future__ import annotations

import torch
from torch import nn

from config import SystemConfig
from engine.world import compiler_for


def compile_model(model: nn.Module, system: SystemConfig, device: torch.device) -> str:
    """Compiles in place, so that saved weights keep their names; tells what was done.

    `auto` compiles on CUDA only: on a CPU it takes about a minute and gains little.
    """
    wanted = device.type == "cuda" if system.compile == "auto" else system.compile
    if not wanted:
        return "not compiled"
    compiler = compiler_for(device)
    if compiler is None:
        return f"not compiled: no compiler for {device.type} on this machine"
    model.compile()
    return f"compiled with {compiler}; the first step takes longer"
