"""The modes that `bench.precision` compares, and a training loop of the trainer's own parts."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from config import Config, LowPrecisionConfig
from data.preparation import stdlib_corpus
from engine.compile import compile_model
from engine.kernels import choose_kernels
from engine.loss import count_targets, next_token_loss
from engine.optim.build import build_optimizer, clip_gradients, gradient_norm, set_learning_rate
from engine.precision.precision import DTYPES, Precision
from engine.schedule import learning_rate
from model import build_model

Sections = dict[str, dict[str, Any]]
Optimizers = Callable[[nn.Module, Config], torch.optim.Optimizer]


@dataclass(frozen=True)
class Mode:
    """The options of a run that are compared; optimizers: builds one that the trainer lacks."""

    title: str
    low: dict[str, Any] = field(default_factory=dict)
    fp8: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    system: dict[str, Any] = field(default_factory=dict)
    optimizers: Optimizers | None = None

    def config(self, shape: Sections) -> Config:
        return Config.from_dict(
            {
                **shape,
                "low_precision": {"use_4bit": False, **self.low},
                "fp8": self.fp8,
                "system": self.system,
                "optimizer": {**shape.get("optimizer", {}), "name": self.optimizer},
            }
        )

    def in_float32(self) -> Mode:
        return replace(self, low={**self.low, "compute_dtype": "float32"})


CPU = torch.device("cpu")
KINDS = ("nf4", "fp4")
HISTORY = 16
DELAYED = {"recipe": "delayed", "amax_history_len": HISTORY}
BF16 = Mode("bf16")
RESIDUAL_BF16 = Mode("bf16, residual stream too", {"residual_dtype": "bfloat16"})
TRITON = Mode("bf16, Triton kernels", system={"kernels": "triton"})
FLOAT32 = Mode("float32").in_float32()
FP8_CURRENT = Mode("fp8 native, current scaling", {"use_fp8": True}, {"backend": "native"})
FP8_DELAYED = replace(
    FP8_CURRENT, title="fp8 native, delayed scaling", fp8={"backend": "native", **DELAYED}
)
ENGINE_CURRENT = replace(
    FP8_CURRENT,
    title="fp8 Transformer Engine, current scaling",
    fp8={"backend": "transformer_engine"},
)
ENGINE_DELAYED = replace(
    FP8_CURRENT,
    title="fp8 Transformer Engine, delayed scaling",
    fp8={"backend": "transformer_engine", **DELAYED},
)
ADAMW_4BIT = Mode("AdamW 4-bit", {"use_4bit_optimizer": True})
ADAMW_8BIT = Mode("AdamW 8-bit", optimizer="adamw_8bit")


def late(kind: str, begin: float = 0.8) -> Mode:
    """Returns the mode with 4-bit weights after this share of the run."""
    low = {"use_4bit": True, "quantization_type": kind, "quantize_after": begin}
    return Mode(f"4-bit weights, {kind}", low)


def low_precision(kind: str) -> LowPrecisionConfig:
    return late(kind).config({}).low_precision


def torchao_mode() -> Mode | str:
    """Returns the mode with torchao's 4-bit AdamW, or the reason why it cannot be imported."""
    try:
        made = importlib.import_module("torchao.optim").AdamW4bit
    except Exception as error:  # one built for another torch raises more than ImportError
        return "not installed" if isinstance(error, ImportError) else type(error).__name__

    def optimizers(model: nn.Module, config: Config) -> torch.optim.Optimizer:
        both = (
            [p for p in model.parameters() if p.dim() >= 2],
            [p for p in model.parameters() if p.dim() < 2],
        )
        decays = config.training.weight_decay, 0.0
        groups = [
            {"params": some, "weight_decay": decay, "lr": torch.tensor(0.0)}
            for some, decay in zip(both, decays, strict=True)
            if some
        ]
        options, values = config.optimizer, {"lr": torch.tensor(0.0)}
        betas = (options.beta1, options.beta2)
        optimizer: torch.optim.Optimizer = made(groups, betas=betas, eps=options.eps, **values)
        return optimizer

    return Mode("AdamW 4-bit of torchao", optimizers=optimizers)


class Trainer:
    """Trains a model in a mode step by step as train.py does, without files and processes.

    emulated: computes bf16 also where the trainer falls back to float32 because bf16 is slow.
    """

    def __init__(
        self,
        shape: Sections,
        mode: Mode,
        device: torch.device,
        seed: int = 0,
        emulated: bool = False,
    ) -> None:
        self.config, self.device, self.number = mode.config(shape), device, 0
        self.precision = Precision(self.config.low_precision, device, self.config.fp8)
        if emulated:
            self.precision.dtype = DTYPES[self.config.low_precision.compute_dtype]
        torch.manual_seed(seed)
        with device:
            self.model = build_model(self.config)
        self.precision.prepare(self.model, self.config.training.max_iters)
        choose_kernels(self.model, self.config, device)
        four_bit = self.config.low_precision.use_4bit_optimizer
        decay = self.config.training.weight_decay
        self.optimizer = (
            build_optimizer(self.model, self.config.optimizer, decay, four_bit)
            if mode.optimizers is None
            else mode.optimizers(self.model, self.config)
        )

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def compile(self, rows: Tensor) -> str:
        """Compiles the model; returns the trainer's line about it."""

        def trial() -> None:
            with self.precision.autocast():
                loss = next_token_loss(self.model, rows, self.device)
            self.precision.backward(loss)
            self.model.zero_grad(set_to_none=True)

        return compile_model(self.model, True, self.device, trial)[1]

    def step(self, rows: Tensor) -> None:
        """Takes a step on rows (B, T+1)."""
        self.number += 1
        config, model = self.config, self.model
        with self.precision.training(self.number):
            with self.precision.autocast():
                loss = next_token_loss(model, rows, self.device) / count_targets(rows)
            self.precision.backward(loss)
        self.precision.unscale(self.optimizer)
        norm, limit = gradient_norm(model), config.optimizer.grad_clip
        # On a GPU the host does not wait for the norm.
        if limit > 0.0 and (norm.is_cuda or norm.item() > limit):
            clip_gradients(model, norm, limit)
        rate = learning_rate(self.number, config, config.training.max_iters)
        if isinstance(self.optimizer.param_groups[0]["lr"], Tensor):  # torchao's compiles it in
            for group in self.optimizer.param_groups:
                group["lr"].fill_(rate)
        else:
            set_learning_rate(self.optimizer, rate)
        self.precision.step(self.optimizer, _alone)
        self.optimizer.zero_grad(set_to_none=True)

    def loss(
        self, batches: Sequence[Tensor], view: AbstractContextManager[None] | None = None
    ) -> float:
        """Returns the mean over the tokens of all batches (B, T+1); view: encloses the passes."""
        self.model.eval()
        with torch.inference_mode(), view or contextlib.nullcontext(), self.precision.autocast():
            total = sum(next_token_loss(self.model, rows, self.device) for rows in batches)
        self.model.train()
        return float(total) / sum(map(count_targets, batches))

    def fp8_matmuls_per_step(self) -> float:
        """Returns their mean since the last call; checks that only FP8 has any."""
        made = self.precision.metrics()
        matmuls = made.get("train/fp8_products", 0.0)
        assert (matmuls > 0) == (self.precision.fp8 is not None), "FP8 without FP8 matmuls"
        return matmuls


def _alone(values: Tensor) -> Tensor:
    """The maximum over one process."""
    return values


def shape_of(model: dict[str, Any], rate: float, steps: int) -> Sections:
    """Returns a small run: 8 x 64 bytes per step, warm-up, cosine to a tenth."""
    training = {"block_size": 64, "batch_size": 8, "max_iters": steps, "learning_rate": rate}
    return {
        "model": {"n_head": 4, "dropout": 0.0, **model},
        "training": {**training, "weight_decay": 0.1},
        "optimizer": {"beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0},
        "schedule": {"name": "cosine", "warmup_iters": min(40, steps // 2)},
    }


def bdh(width: int, multiplier: int, layers: int = 2) -> dict[str, Any]:
    shape = {"n_embd": width, "mlp_internal_dim_multiplier": multiplier, "n_layer": layers}
    return {"name": "bdh", **shape}


def gpt(width: int, layers: int) -> dict[str, Any]:
    return {"name": "gpt", "n_embd": width, "n_layer": layers}


@dataclass(frozen=True)
class Bytes:
    """Text as byte tokens (uint8): training and held-out part."""

    train: Tensor
    held_out: Tensor
    title: str

    def batches(
        self, seed: int, shape: tuple[int, int], held_out: bool = False
    ) -> Iterator[Tensor]:
        """Yields rows (B, T+1) from random positions, which the seed determines, without end."""
        text = self.held_out if held_out else self.train
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(shape[1] + 1)
        while True:
            starts = torch.randint(len(text) - shape[1], (shape[0], 1), generator=generator)
            yield text[starts + offsets]


def read_text(path: Path | None) -> Bytes:
    """Reads a file, its last tenth held out, or Python's sources, every 20th file held out."""
    if path is not None:
        text = _tokens(path.read_bytes())
        cut = len(text) * 9 // 10
        return Bytes(text[:cut], text[cut:], path.name)
    with tempfile.TemporaryDirectory() as folder:
        stdlib_corpus.build(Path(folder) / stdlib_corpus.NAME)
        found = pq.read_table(Path(folder) / stdlib_corpus.NAME, columns=["text"])[
            "text"
        ].to_pylist()
    files = [text.encode() for text in found]
    parts = [[], list[bytes]()]
    for number, file in enumerate(files):
        parts[number % 20 == 10].append(file)
    train, held_out = (_tokens(b"".join(part)) for part in parts)
    return Bytes(train, held_out, "the sources of Python's standard library")


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
