"""torch.compile where it pays and where it works; said at the start, never fatal."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from config import SystemConfig
from engine.hardware.device import compiler_for

PAYS_FLOPS = 2e13  # a minute on two cores: compiling takes 13 s, and a quarter (small) to half off


def compile_wanted(
    system: SystemConfig, device: torch.device, run_flops: float, before: bool | None
) -> bool:
    """Whether `system.compile` asks for it; `auto`: on CUDA, and on a CPU where the run is long.

    run_flops: FLOPs of the whole run. before: what a run that is resumed did, which `auto` follows,
    because compiled and eager steps round differently.
    """
    if system.compile != "auto":
        return system.compile
    if before is not None:
        return before
    return device.type == "cuda" or (device.type == "cpu" and run_flops >= PAYS_FLOPS)


def compile_model(
    model: nn.Module, wanted: bool, device: torch.device, trial: Callable[[], object]
) -> tuple[float | None, str]:
    """Compiles in place, so that saved weights keep their names; the seconds it took, None where it
    did not, and in words.

    `trial` runs the model once: compilers fail then, and the run goes on without. It must leave no
    trace but draws of torch's generators, which are put back.
    """
    if not wanted:
        return None, "not compiled"
    compiler = compiler_for(device)
    if compiler is None:
        return None, f"not compiled: no compiler for {device.type} on this machine"
    model.compile()
    began = time.monotonic()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            trial()
    except Exception as error:  # compilers fail in many ways; the eager model does the same work
        model.compile(disable=True)
        model.zero_grad(set_to_none=True)  # a backward pass that failed leaves some behind
        reason = str(error).strip().splitlines()[0]
        return None, f"not compiled: {compiler} failed ({type(error).__name__}: {reason})"
    seconds = time.monotonic() - began
    return seconds, f"compiled with {compiler} in {seconds:.0f}s"
