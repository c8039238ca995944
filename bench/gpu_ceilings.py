"""The part of `bench.gpu` that measures what the device reaches; bench/gpu_model.py assumes it.

M tokens of 32 x 512, D width, N neurons per head, C tokens of a chunk
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.gpu_parts import Bench, Work
from bench.gpu_report import CEILING, Row


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device reaches; bench/gpu_model.py assumes these rates."""
    size = 1 << (20 if bench.tiny else 30)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for row in bench.compare([Work("copy", lambda: partial(source.clone().copy_, source))]):
        yield replace(row, unit="TB/s", values=[2 * size / ms / 1e9 for ms in row.values])
    for what, sizes in products(bench).items():
        flops, calls = 2.0 * math.prod(sizes), 1 if bench.tiny else 20
        work = Work(what, partial(product, bench, sizes, what, calls), calls=calls)
        for row in bench.compare([work]):
            yield replace(row, unit="TFLOP/s", values=[flops / ms / 1e9 for ms in row.values])
    yield from launches(bench)


def products(bench: Bench) -> dict[str, tuple[int, int, int, int]]:
    """Returns matmuls by name: heads, and (a x b) @ (b x c). BDH's are those of 32 x 512 tokens."""
    M, D, N, C = (64, 16, 32, 16) if bench.tiny else (16384, 256, 8192, 512)
    large = 128 if bench.tiny else 8192
    return {
        CEILING: (1, large, large, large),
        "fp8 of that size": (1, large, large, large),
        "BDH u, v, dz: 256 terms": (4, M, D, N),
        "BDH scores": (4 * M // C, C, N, C),
        "BDH y, da, dx: 8,192 terms": (4, M, N, D),
        "BDH gradient of a weight, float32 result": (4, D, M, N),
        "BDH dr": (4 * M // C, C, C, N),
    }


def repeated(once: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            once()

    return run


def product(
    bench: Bench, sizes: tuple[int, int, int, int], what: str, calls: int
) -> Callable[[], None]:
    """Returns what makes the product `calls` times."""
    batch, a, b, c = sizes
    left = torch.randn(batch, a, b, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(batch, b, c, device=bench.device, dtype=torch.bfloat16)
    if what.startswith("fp8"):
        one = torch.ones((), device=bench.device)
        eight = left[0].to(torch.float8_e4m3fn), right[0].mT.contiguous().to(torch.float8_e4m3fn).mT
        once = partial(torch._scaled_mm, *eight, one, one, out_dtype=torch.bfloat16)
        return repeated(once, calls)
    if what.endswith("float32 result") and bench.cuda:
        return repeated(partial(torch.bmm, left, right, out_dtype=torch.float32), calls)
    return repeated(partial(torch.bmm, left, right, out=left.new_empty(batch, a, c)), calls)


def launches(bench: Bench) -> Iterator[Row]:
    """What the host takes to queue a kernel: the work itself is next to nothing."""
    x, calls = torch.zeros(128, device=bench.device), 10 if bench.tiny else 1000
    ways = {"an eager kernel": lambda: x.add_(1)}
    if not bench.tiny:
        ways["a compiled function"] = torch.compile(lambda: x.add_(1).mul_(0.5))
    works = [Work(what, partial(repeated, once, calls), calls=calls) for what, once in ways.items()]
    for row in bench.compare(works):
        yield replace(row, unit="us", values=[1e3 * ms for ms in row.values])


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {"ceilings": ceilings}
