"""Predicts the training steps of three models on one H200, by counting FLOPs and bytes.

    python -m bench.gpu_model > docs/gpu-predictions.md

It was written before anyone measured, to say what a kernel is worth before it is built, and to be
compared: `bench.gpu` prints these numbers beside the measured ones. A step here is one micro-batch
forward and backward and the optimizer's step (AdamW).

The model is a roofline: a matmul takes the time of its FLOPs or that of its bytes, whichever is
longer; elementwise work takes the time of its bytes; kernels run one after another. The host queues
kernels meanwhile, and a step is never shorter than that takes.

B x T tokens in a micro-batch (M in all, with padding), D width, V vocabulary; BDH: H heads, N
neurons per head, chunks of C tokens, "wide": an (M, H N) tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from bench.bdh_measure import table
from config import Config
from engine.planning.memory import Memory, optimizer_state_bytes
from engine.precision.fp8_native import NativeBackend
from model import LanguageModel, build_model
from model.bdh.model import BDH
from model.bdh.tiling import Tiling
from model.bdh.triton.shapes import triton_tiling
from model.memory import StepShape, activation_bytes, cached_bytes
from model.transformer import Transformer

ModelName = Literal["bdh-25m", "gpt2-124m", "llama-1b"]
Path = Literal["torch", "triton"]
Format = Literal["bf16", "fp8"]
Casts = Literal["copies", "current", "delayed", "epilogue"]
"""How 8-bit operands are made: by torch's passes and its copy of transposes; by one kernel that
writes both layouts, after a pass that finds the scale or with a scale of earlier steps; or by the
kernels that compute the tensors in the first place."""

DATE = "2026-11-21"

# Ceilings of the device
PEAK = 989e12  # FLOP/s in bf16, dense: NVIDIA's data sheet. `share` is of this
MATMUL = 780e12  # FLOP/s in bf16, 8192^3 by cuBLAS: measured by others, 770 to 798
COPY = 4.3e12  # bytes/s read and written by a copy: measured by others; 4.8e12 on the data sheet

# Assumptions, to be replaced by measurements
CUBLAS = 650e12  # FLOP/s of a large training matmul: five sixths of MATMUL
CUBLAS_SHORT = 500e12  # with fewer than 512 terms per sum: as much time begins and ends a block
FUSED_SHORT = 450e12  # of a Triton kernel with 256 terms per sum and an epilogue
FUSED_LONG = 600e12  # of a Triton kernel with long sums
FP8_GAIN = 1.6  # times the FLOP/s in 8 bits; twice on the data sheet, at a lower clock
ATTENTION = {64: 350e12, 128: 500e12}  # FLOP/s of causal cuDNN attention, by head size
ELEMENTWISE = 0.9 * COPY  # compiled elementwise kernels
BYTEWISE = 0.15 * COPY  # torch's copy of an 8-bit transpose: neighbours are far apart in memory
NARROW_BYTES = 40  # per number of an (M, D) tensor and layer of BDH: norms, residual, masks
EAGER_S, COMPILED_S, TRITON_S = 9e-6, 45e-6, 12e-6  # of the host, to queue a kernel
FIXED_S = 0.4e-3  # batch, loss, gradient norm, and the gaps between them

_TINY_LLAMA = {"n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 4, "d_ff": 5632}
SIZES: dict[str, dict[str, Any]] = {
    "bdh-25m": {"name": "bdh", "n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 256},
    "gpt2-124m": {"name": "gpt", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304},
    "llama-1b": {"name": "llama", **_TINY_LLAMA, "vocab_size": 32000},
}
PATHS: dict[ModelName, list[tuple[Path, Format]]] = {
    "bdh-25m": [("torch", "bf16"), ("torch", "fp8"), ("triton", "bf16")],
    "gpt2-124m": [("torch", "bf16"), ("torch", "fp8")],
    "llama-1b": [("torch", "bf16"), ("torch", "fp8")],
}
BATCHES: dict[ModelName, list[tuple[int, int]]] = {
    "bdh-25m": [(8, 512), (32, 512), (64, 512), (32, 1024), (8, 2048), (1, 8192), (8, 8192)],
    "gpt2-124m": [(12, 1024), (48, 1024)],
    "llama-1b": [(4, 2048), (8, 2048)],
}


@dataclass(frozen=True)
class Prediction:
    """One training step: share of PEAK by the model's own FLOPs; bytes: its peak of memory."""

    ms: float
    tokens_per_s: float
    share: float
    bytes: int


def predict(
    model: ModelName, path: Path, batch: int, block: int, dtype: Format = "bf16"
) -> Prediction:
    """Predicts a step of `batch` sequences of `block` tokens.

    path: of BDH's layers, in bf16 if it is "triton"; GPT and Llama are compiled by torch.
    """
    config, built = _built(model, path, batch, block, dtype)
    if isinstance(built, BDH):
        step = _bdh_step(built, batch, block, dtype)
    else:
        assert isinstance(built, Transformer)
        step = _transformer_step(built, batch, block, dtype)
    flops = built.flops_per_token(block) * batch * block
    memory = _bytes(config, built, batch, block)
    return Prediction(step.s * 1e3, batch * block / step.s, flops / step.s / PEAK, memory)


class Step:
    """Adds up the seconds of a step."""

    def __init__(self, dtype: Format, launch_s: float) -> None:
        """launch_s: of the host, for an elementwise kernel."""
        self.in_8_bits, self.launch_s = dtype == "fp8", launch_s
        self.gpu_s, self.host_s = FIXED_S, 3e-3

    @property
    def s(self) -> float:
        """Seconds of the step: of the GPU, unless the host is slower."""
        return max(self.gpu_s, self.host_s)

    def matmul(
        self,
        m: float,
        k: float,
        n: float,
        count: int = 1,
        rate: float | None = None,
        weights: bool = True,
        also: float = 0,
    ) -> None:
        """Adds `count` products (m, k) (k, n). weights: it takes part in FP8; also: bytes that an
        epilogue reads and writes beside the operands."""
        fp8 = self.in_8_bits and weights
        rate = rate or (CUBLAS if k >= 512 else CUBLAS_SHORT)
        seconds = 2 * m * k * n / (rate * (FP8_GAIN if fp8 else 1))
        size = (1 if fp8 else 2) * (m * k + k * n) + 2 * m * n + also
        self.gpu_s += count * max(seconds, size / ELEMENTWISE)
        self.host_s += count * EAGER_S

    def elementwise(self, size: float, kernels: int = 1) -> None:
        """Adds kernels that read and write `size` bytes in all."""
        self.gpu_s += size / ELEMENTWISE
        self.host_s += kernels * self.launch_s

    def cast(self, numbers: float, casts: Casts = "current", transposed: bool = True) -> None:
        """Adds the cast of bf16 numbers to 8 bits. transposed: by columns too; the kernel writes
        both layouts always."""
        if not self.in_8_bits or casts == "epilogue":
            return
        if casts != "delayed":
            self.elementwise(2 * numbers)  # their largest
        self.elementwise((3 if casts == "copies" else 4) * numbers)
        if casts == "copies" and transposed:
            self.gpu_s += 2 * numbers / BYTEWISE
            self.host_s += EAGER_S

    def optimizer(self, parameters: int) -> None:
        """Adds AdamW: weight, gradient and moments read, all but the gradient written; the norm."""
        self.elementwise(parameters * 4 * (4 + 3 + 1))


# BDH


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a BDH step."""

    M: int
    D: int
    HN: int
    H: int
    C: int
    X: int
    chunked: bool

    @property
    def wide(self) -> float:
        """Bytes of a wide tensor in bf16."""
        return 2.0 * self.M * self.HN

    @property
    def causal(self) -> float:
        """The part of a chunk's scores that is computed: blocks of 128 up to the diagonal."""
        blocks = max(1, self.C // 128)
        return (blocks + 1) / (2 * blocks)

    @property
    def state_bytes(self) -> float:
        """Bytes of the states before all chunks."""
        return 2.0 * self.X * self.HN * self.D


def _bdh_step(model: BDH, batch: int, block: int, dtype: Format, casts: Casts = "current") -> Step:
    """casts: of FP8; only `epilogue` has products in 8 bits on the Triton path."""
    H, D, N = model.shape
    tokens, products = (batch, block), torch.bfloat16
    tiling = Tiling.of(tokens, model.shape, products, on_cpu=False)
    if model.triton:
        tiling = triton_tiling(tokens, model.shape, products)
    C = tiling.chunk
    X = batch * math.ceil(block / C)
    sizes = _Sizes(X * C, D, H * N, H, C, X, block > C)
    step = Step(dtype, TRITON_S if model.triton else COMPILED_S)
    for layer in range(model.n_layer):
        if model.triton:
            _triton_forward(step, sizes)
            _triton_backward(step, sizes, layer < tiling.kept_layers)
        else:
            _torch_forward(step, sizes, casts)
            _torch_backward(step, sizes, casts)
        step.elementwise(NARROW_BYTES * sizes.M * D * (1 + H), 8)
        step.elementwise(3 * 8 * D * H * N)  # gradients of the weights, summed over layers
    step.matmul(sizes.M, D, model.config.vocab_size, count=3, weights=False)
    step.optimizer(sum(p.numel() for p in model.parameters()))
    return step


def _torch_forward(step: Step, z: _Sizes, casts: Casts) -> None:
    """F1 to F7 of model/bdh/fused_layers.py, in one tile."""
    step.matmul(z.M, z.D, z.HN)  # u
    step.elementwise(2 * z.wide)  # r = rope(u)
    _scores(step, z)
    if z.chunked:
        _states(step, z, products=2, scans=1)
    step.matmul(z.M, z.D, z.HN)  # v
    step.elementwise(3 * z.wide)  # z, over v
    step.cast(z.M * z.HN, casts, transposed=False)
    step.matmul(z.M, z.HN, z.D)  # y


def _torch_backward(step: Step, z: _Sizes, casts: Casts) -> None:
    """B1 to B10; u and v are computed again."""
    step.matmul(z.M, z.D, z.HN, count=3)  # u, v, dz
    step.elementwise(6 * z.wide)  # z, dv, du
    step.cast(z.M * z.HN, casts)  # z
    step.cast(z.M * z.HN, casts)  # dv
    step.matmul(z.D, z.M, z.HN, count=2)  # dW, dG
    step.matmul(z.M, z.HN, z.D)  # da
    step.elementwise(2 * z.wide)  # r again
    _score_gradients(step, z)
    step.matmul(z.M, z.C, z.HN, weights=False, also=z.wide)  # dr
    if z.chunked:
        _states(step, z, products=5, scans=2)
        step.elementwise(4 * z.wide, 0)  # two of them add to dr
    step.elementwise(4 * z.wide)  # du += rope^T(dr)
    step.cast(z.M * z.HN, casts)  # du
    step.matmul(z.D, z.M, z.HN)  # dE
    step.matmul(z.M, z.HN, z.D)  # dx


def _triton_forward(step: Step, z: _Sizes) -> None:
    """Every elementwise pass is the epilogue of a product."""
    _encode(step, z)
    _scores(step, z, FUSED_LONG)
    if z.chunked:
        _states(step, z, products=2, scans=1)
    # In 8 bits z is written as such: half as many bytes.
    saved = z.wide / 2 if step.in_8_bits else 0
    step.matmul(z.M, z.D, z.HN, rate=FUSED_SHORT, also=z.wide - saved)  # z, from s
    step.matmul(z.M, z.HN, z.D)  # y


def _encode(step: Step, z: _Sizes) -> None:
    """s = relu(x E), and r."""
    step.matmul(z.M, z.D, z.HN, rate=FUSED_SHORT, also=z.wide)


def _triton_backward(step: Step, z: _Sizes, keeps: bool) -> None:
    """keeps: s and r of the forward pass."""
    if not keeps:
        _encode(step, z)
    # Reads s and writes z, dv, ds: two products, of which each is counted with one output. In 8
    # bits z is written by columns, dv in both layouts.
    saved = z.wide / 2 if step.in_8_bits else 0
    step.matmul(z.M, 2 * z.D, z.HN, rate=FUSED_SHORT, also=3 * z.wide - saved)
    step.matmul(z.D, z.M, z.HN, count=2)  # dW, dG
    step.matmul(z.M, z.HN, z.D)  # da
    _score_gradients(step, z)
    # Reads r, s, ds, writes du; in 8 bits in both layouts, which are as many bytes.
    step.matmul(z.M, z.C, z.HN, rate=FUSED_LONG, weights=False, also=3 * z.wide)
    if z.chunked:
        _states(step, z, products=5, scans=2)
    step.matmul(z.D, z.M, z.HN)  # dE
    step.matmul(z.M, z.HN, z.D)  # dx


def _scores(step: Step, z: _Sizes, rate: float = CUBLAS) -> None:
    """S = r r^T within chunks, masked; and S x."""
    step.matmul(z.M, z.HN, z.C, rate=rate / z.causal, weights=False)
    step.elementwise(2 * 3 * z.H * z.M * z.C)
    step.matmul(z.M, z.C, z.H * z.D, weights=False)


def _score_gradients(step: Step, z: _Sizes) -> None:
    """dS = dc x^T, dS + dS^T, and S^T dc."""
    step.matmul(z.M, z.H * z.D, z.C, weights=False)
    step.elementwise(14 * z.H * z.M * z.C)
    step.matmul(z.M, z.C, z.H * z.D, weights=False)


def _states(step: Step, z: _Sizes, products: int, scans: int) -> None:
    """Products of r with states or into them, and the scans over chunks, read and written once."""
    step.matmul(z.M, z.D, z.HN, count=products, rate=CUBLAS, weights=False, also=z.state_bytes)
    for _ in range(scans):
        step.elementwise(2 * z.state_bytes)


# GPT and Llama


def _transformer_step(model: Transformer, batch: int, block: int, dtype: Format) -> Step:
    """All of the model is compiled: elementwise work is fused between the products."""
    step, M, D = Step(dtype, EAGER_S), batch * block, model.config.n_embd
    for linear in model.hidden_linears().values():
        _linear(step, M, linear.in_features, linear.out_features)
    head_size = D // model.config.n_head
    for _ in range(model.config.n_layer):
        # Scores and their product with the values; backward has five of such, forward two.
        pairs = batch * block * block / 2
        seconds = 7 * 2 * pairs * D / ATTENTION[head_size]
        step.gpu_s += seconds
        step.elementwise(2 * 20 * D * M, 14)  # two norms and sums, in float32
    V = model.vocab_size
    # Logits in chunks of rows: written, read twice, and their gradient written and read twice.
    step.matmul(M, D, V, count=3, weights=False)
    step.elementwise(2 * 6 * M * V, 50)
    step.optimizer(sum(p.numel() for p in model.parameters()))
    return step


def _linear(step: Step, M: int, k: int, n: int) -> None:
    """y = x W, dx and dW, with what prepares the operands and the elementwise work around it."""
    step.elementwise((4 + 2 + 4 + 2) * k * n, 2)  # W to bf16; its gradient to float32
    step.elementwise(2 * 3 * M * (k + n), 0)  # x written, y read; backward about twice that
    for numbers in (k * n, M * k, M * n):
        step.cast(numbers)
    step.matmul(M, k, n)
    step.matmul(M, n, k)
    step.matmul(k, M, n)


# Memory


@cache
def _built(
    name: ModelName, path: Path, batch: int, block: int, dtype: Format
) -> tuple[Config, LanguageModel]:
    """Returns the config and the model, without memory."""
    assert path == "torch" or dtype == "bf16", "the Triton path has no 8-bit matmuls"
    training = {"batch_size": batch, "block_size": block}
    low = {"use_4bit": False, "use_fp8": dtype == "fp8"}
    config = Config.from_dict(
        {"model": {"dropout": 0.0, **SIZES[name]}, "training": training, "low_precision": low}
    )
    with torch.device("meta"):
        model = build_model(config)
    if dtype == "fp8":
        NativeBackend(config.fp8, model, torch.device("cuda"), torch.bfloat16)
    if path == "triton":
        model.use_triton()
    return config, model


def _bytes(config: Config, model: LanguageModel, batch: int, block: int) -> int:
    """Returns the peak of a step, by the formulas of a run's start."""
    step = StepShape(batch, block, torch.bfloat16, on_cpu=False)
    weights = sum(p.nbytes for p in model.parameters())
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer_state_bytes(model, config),
        copies=0,
        activations=activation_bytes(model, step) or 0,
        update=0,
        cached=cached_bytes(model, step),
    ).step


# The page

_PAGE = """\
# Predictions for an H200

Predicted on {date}, before anyone had run this code on a GPU. **Nothing on this page is measured.**
`python -m bench.gpu_model` prints it, and `bench/gpu.py` shows these numbers beside measured ones.
Where they differ, an assumption below is wrong; its table of ceilings says which.

A step is one micro-batch forward and backward, without dropout, and the step of AdamW. The share is
that of {peak:.0f} TFLOP/s (the data sheet's bf16 rate) by the FLOPs of the model, without products
that are computed again. Memory is what the start of a run predicts. `torch` and `triton` are the
values of `system.kernels`; GPT and Llama are compiled by torch either way.
{tables}
## FP8 on BDH

BDH's tensors are wide and its sums short (256 terms), so a product in 8 bits saves little more than
the reading of its operands, and every cast is a pass over a tensor of M x 32,768 numbers. ms per
step at 32 x 512, by how operands are made:

{fp8}

So FP8 does not pay on BDH as long as operands are cast. Casting and transposing in one kernel
(`engine/precision/fp8_cast.py`) brings it near bf16. Kernels that write z, dv and du in 8 bits in
the first place would pay; they are not built. One product for all heads would save {launches}
launches and {partial:.1f} ms of sums over heads: not built either. GPT and Llama gain from FP8 by
their longer sums.

## Assumptions

Counted are FLOPs and bytes of the code as it is: head and loss inside the model in chunks of rows;
BDH in one tile, scores in causal strips of 128 tokens, u and v computed again in backward (on the
Triton path v, and u in the layers whose s and r are not kept). A kernel takes the time of its FLOPs
or of its bytes, whichever is longer. Kernels follow one another, while the host queues the next; a
step is not shorter than that takes.

{assumptions}
"""


def page() -> str:
    """Returns docs/gpu-predictions.md."""
    found = [f"\n## {name}\n\n" + "\n".join(_table(name)) + "\n" for name in BATCHES]
    H, layers = SIZES["bdh-25m"]["n_head"], SIZES["bdh-25m"]["n_layer"]
    return _PAGE.format(
        date=DATE,
        peak=PEAK / 1e12,
        tables="".join(found),
        fp8="\n".join(_fp8_table(32, 512)),
        launches=layers * 5 * (H - 1),  # of u, y, dz and dE, dx: the others have operands by head
        partial=layers * 8 * (H - 1) * 32 * 512 * 256 / ELEMENTWISE * 1e3,
        assumptions="\n".join(_assumptions()),
    )


def _table(name: ModelName) -> Iterator[str]:
    rows = []
    for batch, block in BATCHES[name]:
        for path, dtype in PATHS[name]:
            found = predict(name, path, batch, block, dtype)
            speed, memory = f"{found.tokens_per_s / 1e3:.0f}k", f"{found.bytes / 1e9:.2g}"
            cells = [f"{batch} x {block}", path, dtype, f"{found.ms:.0f}", speed]
            rows.append([*cells, f"{found.share:.0%}", memory])
    return table(("B x T", "path", "format", "ms", "tokens/s", "share", "GB"), rows)


def _fp8_table(batch: int, block: int) -> Iterator[str]:
    ways: dict[str, tuple[Path, Format, Casts]] = {
        "bf16": ("torch", "bf16", "current"),
        "amax, cast, and torch's copy of transposes": ("torch", "fp8", "copies"),
        "amax, then one kernel that writes both layouts": ("torch", "fp8", "current"),
        "one kernel, scales of earlier steps": ("torch", "fp8", "delayed"),
        "Triton path, bf16": ("triton", "bf16", "current"),
        "Triton path, kernels that write 8 bits (not built)": ("triton", "fp8", "epilogue"),
    }
    rows = []
    for title, (path, dtype, casts) in ways.items():
        model = _built("bdh-25m", path, batch, block, "bf16")[1]
        assert isinstance(model, BDH)
        rows.append([title, f"{_bdh_step(model, batch, block, dtype, casts).s * 1e3:.0f}"])
    return table(("operands", "ms"), rows)


def _assumptions() -> Iterator[str]:
    rates = {
        "cuBLAS, bf16 8192^3 (measured by others; the ceiling)": MATMUL,
        "cuBLAS, training matmuls": CUBLAS,
        "cuBLAS, fewer than 512 terms per sum": CUBLAS_SHORT,
        "Triton kernels of BDH with products over D": FUSED_SHORT,
        "Triton kernels of BDH with long sums": FUSED_LONG,
        **{f"causal attention, heads of {width}": rate for width, rate in ATTENTION.items()},
    }
    rows = [[what, f"{rate / 1e12:.0f} TFLOP/s"] for what, rate in rates.items()]
    rows += [
        ["the same in FP8", f"{FP8_GAIN} times that"],
        ["a copy (measured by others)", f"{COPY / 1e12:.1f} TB/s"],
        ["elementwise kernels, operands of matmuls", f"{ELEMENTWISE / 1e12:.1f} TB/s"],
        ["torch's copy of an 8-bit transpose", f"{BYTEWISE / 1e12:.1f} TB/s"],
        ["host: eager call, compiled call, Triton kernel", "9, 45 and 12 us"],
    ]
    return table(("assumption", "value"), rows)


if __name__ == "__main__":
    print(page(), end="")
