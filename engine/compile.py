"""torch.compile where it pays off and where it works. A failure is printed and never fatal."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from config import ConfigError, SystemConfig
from engine.hardware.device import compiler_for
from engine.hardware.memory import ran_out
from engine.hardware.sharding import is_sharded
from model.interface import LanguageModel

# Of a run on a CPU: about a minute on two cores. Compiling takes 13 s there, and makes steps of
# small models a quarter and of large ones a half shorter.
PAYS_FLOPS = 2e13


def compile_wanted(
    system: SystemConfig, device: torch.device, run_flops: float, before: bool | None
) -> bool:
    """Returns whether `system.compile` asks to compile; `auto`: on CUDA, and on a CPU in long runs.

    run_flops: FLOPs of the whole run. before: whether the run that is resumed was compiled, None
    for a new run. `auto` follows it, because compiled and eager steps round differently.
    """
    if system.compile != "auto":
        return system.compile is not False
    if before is not None:
        return before
    return device.type == "cuda" or (device.type == "cpu" and run_flops >= PAYS_FLOPS)


def compile_model(
    model: nn.Module, wanted: bool, device: torch.device, trial: Callable[[], object]
) -> tuple[float | None, str]:
    """Compiles the model in place; returns the seconds it took, None where it is not compiled, and
    what happened in words.

    In place, because a wrapped model would save its weights under other names. trial: runs the
    model once, for compilers fail only then; the run goes on without. It may draw random numbers,
    which are put back, and leave nothing else behind. Raises its error if memory ran out, and
    ConfigError if a sharded model cannot be compiled.
    """
    if not wanted:
        return None, "not compiled"
    compiler = compiler_for(device)
    if compiler is None:
        return None, f"not compiled: no compiler for {device.type} on this machine"
    # Between the layers of a sharded model their weights are gathered.
    if isinstance(model, LanguageModel) and is_sharded(model):
        model.compile_layers()
    else:
        model.compile()
    began = time.monotonic()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            trial()
    except Exception as error:  # compilers fail in many ways; the eager model does the same work
        if ran_out(error):  # the eager model would need more still
            raise
        reason = str(error).strip().splitlines()[0]
        words = f"{compiler} failed ({type(error).__name__}: {reason})"
        if is_sharded(model):  # torch does not say how to go on after a forward pass that failed
            raise ConfigError(f"system.compile: {words}. Set system.compile: false.") from error
        model.compile(disable=True)
        model.zero_grad(set_to_none=True)  # the failed backward pass may have made some gradients
        return None, f"not compiled: {words}"
    seconds = time.monotonic() - began
    return seconds, f"compiled with {compiler} in {seconds:.0f}s"
