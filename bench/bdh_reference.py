"""The rivals of `bench.bdh`, all behind one interface, and the proof that they compute the same.

The public reference is imported from a clone of pathwaycom/bdh that lies elsewhere; nothing of it
is part of this project. Every rival starts from the same weights, in its own layout.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bdh_measure import seconds
from config import BDHConfig, ConfigError
from model.bdh import BDH, to_upstream

LIMIT = 1e-4  # of the relative error of logits, loss and gradients in float32


@dataclass(frozen=True)
class Kind:
    """A way to run a step. `name` is what --memory-of takes, `title` what tables show."""

    name: str
    title: str
    dtype: torch.dtype
    compiled: bool
    ours: bool
    triton: bool = False

    def says(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{', compiled' if self.compiled else ''}"


def kinds(device: torch.device, reference: ModuleType | None) -> list[Kind]:
    """All rivals, the reference as its train.py runs it on this device first."""
    cuda, single, half = device.type == "cuda", torch.float32, torch.bfloat16
    theirs = Kind("reference", "", half if cuda else single, cuda, False)
    theirs = replace(theirs, title=f"reference as shipped ({theirs.says()})")
    eager = ", no compiler" if cuda else ""
    ours = [
        Kind("float32", "ours, float32, no compiler", single, False, True),
        Kind("bf16-eager", "ours, bf16, no compiler", half, False, True),
        Kind("bf16", "ours, bf16, compiled", half, True, True),
    ]
    if cuda and find_spec("triton"):
        ours.append(Kind("triton", "ours, bf16, Triton kernels", half, True, True, triton=True))
    if reference is None:
        return ours
    autocast = Kind("reference-bf16", f"reference, bf16 autocast{eager}", half, False, False)
    return [theirs, autocast, *ours]


def load(directory: Path) -> ModuleType:
    """The reference's module `bdh.py`, from its clone."""
    name = "pathwaycom_bdh"
    spec = importlib.util.spec_from_file_location(name, directory / "bdh.py")
    if spec is None or spec.loader is None or not (directory / "bdh.py").is_file():
        raise SystemExit(f"--reference: {directory} has no bdh.py; clone pathwaycom/bdh there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Rival:
    """A model of one kind; `step` is a training step without optimizer, gradients discarded."""

    def __init__(self, kind: Kind, weights: BDH, reference: ModuleType | None) -> None:
        self.kind, self.device = kind, weights.lm_head.device
        self.model: Any = _copy(weights) if kind.ours else _theirs(weights, reference)
        self._forward: Callable[..., Any] = self.model
        if kind.triton and (misfit := self.model.use_triton()) is not None:
            raise ConfigError(misfit)
        if kind.compiled and kind.ours:
            self.model.compile()
        elif kind.compiled:
            self._forward = torch.compile(self.model)

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.kind.dtype == torch.bfloat16
        )

    def logits_and_loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            if not self.kind.ours:
                logits, loss = self._forward(tokens, targets)
                return logits, loss
            logits = self._forward(tokens)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        if self.kind.ours:  # as train.py: without logits
            with self.autocast():
                loss = self._forward(tokens, targets=targets) / targets.numel()
        else:
            loss = self.logits_and_loss(tokens, targets)[1]
        torch.autograd.backward(loss)
        self.model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> None:
        """What the reference's `generate` computes for each token it adds to these."""
        with self.autocast():
            self._forward(tokens)

    def gradients(self) -> dict[str, Tensor]:
        """By name, in the reference's layout."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if not self.kind.ours:
            return found
        shell = BDH(self.model.config).to(self.device, self.model.lm_head.dtype)
        shell.load_state_dict(found)
        return to_upstream(shell)


def _copy(weights: BDH) -> BDH:
    copy = BDH(weights.config).to(weights.lm_head.device, weights.lm_head.dtype)
    copy.load_state_dict(weights.state_dict())
    return copy


def _theirs(weights: BDH, reference: ModuleType | None) -> Any:
    if reference is None:
        raise SystemExit("rows of the reference need --reference DIR")
    own = weights.config
    names = reference.BDHConfig.__dataclass_fields__
    model = reference.BDH(reference.BDHConfig(**{name: getattr(own, name) for name in names}))
    model.load_state_dict(to_upstream(weights))
    return model.to(weights.lm_head.device)


class Decoder:
    """A model at a position of a text, taking single greedy steps from there."""

    def __init__(self, rival: Rival, prompt: Tensor) -> None:
        self.rival, model = rival, rival.model
        with torch.inference_mode(), rival.autocast():
            self.state = model.init_cache(1)
            self.prefill = seconds(lambda: self._feed(prompt[None]), rival.device)

    def _feed(self, tokens: Tensor) -> None:
        self.next = self.rival.model.prefill_or_decode(tokens, self.state).argmax(-1, keepdim=True)

    def burst(self) -> list[float]:
        """Seconds of 10 tokens; two more come first and bring the weights back to the caches."""
        with torch.inference_mode(), self.rival.autocast():
            steps = [seconds(lambda: self._feed(self.next), self.rival.device) for _ in range(12)]
        return steps[2:]


class Recompute:
    """The reference's way: the whole prefix for each token."""

    prefill = 0.0

    def __init__(self, rival: Rival, prompt: Tensor) -> None:
        self.rival, self.tokens = rival, prompt[None]

    def burst(self) -> list[float]:
        return [seconds(lambda: self.rival.forward(self.tokens), self.rival.device)]


def step_bytes(kind: Kind, config: BDHConfig, batch: int, length: int) -> int:
    """About what a training step of the reference takes: 8 wide tensors and 3 of scores a layer."""
    wide = batch * length * config.n_embd * config.mlp_internal_dim_multiplier
    scores = batch * config.n_head * length * length
    return config.n_layer * (8 * wide + 3 * scores) * kind.dtype.itemsize


Errors = tuple[str, float, float, float]
"""Of what; logits, loss, and the worst of the gradients."""


def errors(name: str, rival: Rival, exact: Rival, batch: tuple[Tensor, Tensor]) -> Errors:
    """Norm of the difference over norm of the exact value."""
    found, expected = rival.logits_and_loss(*batch), exact.logits_and_loss(*batch)
    for loss in (found[1], expected[1]):
        torch.autograd.backward(loss)
    pairs = list(zip(found, expected, strict=True))
    theirs, own = exact.gradients(), rival.gradients()
    names = [name for name, _ in exact.model.named_parameters()]
    worst = max(_relative(own[name], theirs[name]) for name in names)
    for model in (rival.model, exact.model):
        model.zero_grad(set_to_none=True)
    return name, _relative(*pairs[0]), _relative(*pairs[1]), worst


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = found.detach().double() - expected.detach().double()
    ratio = float(difference.norm() / expected.detach().double().norm())
    return ratio if math.isfinite(ratio) else math.inf


Batch = Callable[[int, int], tuple[Tensor, Tensor]]


def parity(
    configs: list[tuple[BDHConfig, int, int]],
    reference: ModuleType,
    device: torch.device,
    batch: Batch,
) -> Iterator[Errors]:
    """Float32, dropout 0: ours against the reference, with and without a compiler; 3 batches.

    Logits and loss are the worst of them. Of gradients it is the median, and batches are small:
    where a pre-activation within a rounding error of zero gets another sign, its gradient is all or
    nothing. The reference in float32 is 3e-4 from itself in float64 in such a batch.
    """
    for config, rows, length in configs:
        weights = BDH(replace(config, dropout=0.0)).to(device)
        exact = Rival(Kind("", "", torch.float32, False, False), weights, reference)
        for compiled in (False, True):
            rival = Rival(Kind("", "", torch.float32, compiled, True), weights, reference)
            passes = "compiled" if compiled else "eager"
            name = f"D {config.n_embd}, {rows} x {length} tokens, {passes} passes"
            found = [errors(name, rival, exact, batch(rows, length)) for _ in range(3)]
            _, logits, loss, gradients = zip(*found, strict=True)
            typical = sorted(gradients)[1] if max(gradients) < math.inf else math.inf
            yield name, max(logits), max(loss), typical


def rounding(
    config: BDHConfig,
    some: Sequence[Kind],
    reference: ModuleType | None,
    device: torch.device,
    batch: tuple[Tensor, ...],
) -> Iterator[Errors]:
    """Each rival against a float64 run of ours."""
    weights = BDH(replace(config, dropout=0.0)).to(device)
    exact = Rival(Kind("", "", torch.float64, False, True), _copy(weights).double(), None)
    for kind in some:
        rival = Rival(kind, weights, reference)
        yield errors(kind.title, rival, exact, (batch[0], batch[1]))


def train(
    model: BDH, text: Tensor, steps: int, tokens: tuple[int, int], learning_rate: float = 1e-3
) -> float:
    """Trains on random windows of a text of bytes, (B, T) `tokens` a step; the last loss."""
    device, (B, T) = model.lm_head.device, tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - T, (B,))
        rows = torch.stack([text[start : start + T + 1] for start in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return float(loss.detach())
