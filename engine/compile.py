"""torch.compile where it pays and where it works; said at the start, never fatal."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from config import SystemConfig
from engine.world import compiler_for


def compile_model(
    model: nn.Module, system: SystemConfig, device: torch.device, trial: Callable[[], object]
) -> str:
    """Compiles in place, so that saved weights keep their names; tells what was done.

    `trial` runs the model once: compilers fail then, and the run goes on without. It must leave no
    trace but draws of torch's generators, which are put back. `auto` compiles on CUDA only: on a
    CPU it takes half a minute and gains little.
    """
    wanted = device.type == "cuda" if system.compile == "auto" else system.compile
    if not wanted:
        return "not compiled"
    compiler = compiler_for(device)
    if compiler is None:
        return f"not compiled: no compiler for {device.type} on this machine"
    model.compile()
    began = time.monotonic()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            trial()
    except Exception as error:  # compilers fail in many ways; the eager model does the same work
        model._compiled_call_impl = None
        model.zero_grad(set_to_none=True)  # a backward pass that failed leaves some behind
        reason = str(error).strip().splitlines()[0]
        return f"not compiled: {compiler} failed ({type(error).__name__}: {reason})"
    return f"compiled with {compiler} in {time.monotonic() - began:.0f}s"
