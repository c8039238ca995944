"""torch.compile: for small functions that are called with many shapes, and its cache on disk."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# Variants of one function. Beyond its limit torch stops compiling and runs the function unfused,
# without an error; its own limit is 8.
_RECOMPILE_LIMIT = 64


def separate_caches_by_cpu() -> None:
    """Adds the CPU's instruction set to the key under which torch keeps compiled code on disk.

    Code for AVX-512 computed nonsense in a process that was told to use AVX2, and would do so on
    another machine that shares the home directory.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()


def compile_shapes(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """Compiles a function anew for each combination of shapes and dtypes that it meets."""
    separate_caches_by_cpu()
    options: dict[str, Any] = {"dynamic": dynamic}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # Since torch 2.12 the settings of torch._dynamo are those of one thread, and on a GPU
        # backward passes run in a thread of their own. The function keeps this limit everywhere.
        options["recompile_limit"] = _RECOMPILE_LIMIT
    else:
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _RECOMPILE_LIMIT)
    compiled: Callable[..., Any] = torch.compile(function, **options)
    return compiled
